"""The bound of ABML against its algorithm in one graph of plain autograd, and against finite differences."""

import pytest
import torch
from torch.distributions import ExpTransform, Gamma, Normal, PowerTransform, TransformedDistribution, kl_divergence
from torch.func import functional_call

import online_meta as om
from online_meta.functional.keyed import keyed, normal_like_all
from online_meta.functional.randomness import INIT_STEP
from online_meta.testing.compare import assert_close
from online_meta.testing.oracle import CRITERIA
from tests.numerics.problems import problem
from tests.numerics.reference_loop import check_slope_of_bound, join_parts, shifted

STEPS, LR, INNER_KL = 3, 0.1, 0.4
WEIGHTS = {"kl_weight": 0.3, "hyperprior_weight": 0.2}


def setting(draws=1, steps=STEPS, **weights):
    given = problem("mlp_tanh")
    rule = om.rules.bayes_by_gradient(lr=LR, log_std=-1.5, kl_weight=INNER_KL, draws=draws)
    inner = om.Inner(om.model_loss(given.module, given.loss), rule, steps)
    meta = inner.init(given.weights())
    return given, om.Meta(meta.weights, shifted(meta.rule)), om.hierarchical_variational(inner, **(weights or WEIGHTS))


def join(task):
    return om.Batch(*(torch.cat(pair) for pair in zip(task.support[:2], task.query[:2], strict=True)))


def write_out(given, meta, task, draws, kl_weight, hyperprior_weight):
    """Return the objective of Ravi & Beatson and its gradient, with the distributions of torch."""
    leaves = om.Meta(*({n: v.detach().clone().requires_grad_() for n, v in part.items()} for part in meta))
    mu, log_sigma = leaves.weights, {n: leaves.rule[f"{n}.log_std"] for n in leaves.weights}
    mean, log_std = dict(mu), dict(log_sigma)

    def judge(batch):
        total = 0.0
        for _ in range(draws):
            noise = normal_like_all(mu)
            weights = {n: mean[n] + log_std[n].exp() * noise[n] for n in mu}
            total = total + CRITERIA[given.loss](functional_call(given.module, weights, (batch.x,)), batch.y)
        return total / draws

    share = LR * INNER_KL / len(task.support.x)
    for k in range(STEPS):
        with keyed(task.support, k + 1, "step"):
            seen = torch.autograd.grad(judge(task.support), [*mean.values(), *log_std.values()], create_graph=True)
        by_mean, by_std = (dict(zip(mu, part, strict=True)) for part in (seen[: len(mu)], seen[len(mu) :]))
        pull = {n: share / log_sigma[n].exp() ** 2 for n in mu}
        mean = {n: (mean[n] - LR * by_mean[n] + pull[n] * mu[n]) / (1 + pull[n]) for n in mu}
        ratio = {n: (log_std[n].exp() / log_sigma[n].exp()) ** 2 for n in mu}
        log_std = {n: log_std[n] - LR * by_std[n] - share * (ratio[n] - 1) for n in mu}

    both = join(task)
    with keyed(both, INIT_STEP, "query"):
        bound = judge(both)
    one = torch.ones((), dtype=torch.float64)
    of_log_sigma = TransformedDistribution(Gamma(one, 0.01 * one), [PowerTransform(-0.5 * one), ExpTransform().inv])
    for n in mu:
        divergence = kl_divergence(Normal(mean[n], log_std[n].exp()), Normal(mu[n], log_sigma[n].exp())).sum()
        log_prior = Normal(0 * one, one).log_prob(mu[n]).sum() + of_log_sigma.log_prob(log_sigma[n]).sum()
        bound = bound + (kl_weight * divergence - hyperprior_weight * log_prior) / len(both.x)
    grads = iter(torch.autograd.grad(bound, [*mu.values(), *leaves.rule.values()]))
    return om.MetaGrad(bound.detach(), om.Meta(*({n: next(grads) for n in part} for part in leaves)))


@pytest.mark.parametrize("draws", [1, 2])
def test_the_bound_is_that_of_the_algorithm(draws):
    given, meta, gradient = setting(draws)
    task = given.task()
    found, right = gradient(meta, task), write_out(given, meta, task, draws, **WEIGHTS)
    torch.testing.assert_close(found.loss, right.loss, rtol=1e-12, atol=0)
    assert_close(join_parts(found.grads), join_parts(right.grads), 1e-10)


def test_the_gradient_is_the_slope_of_the_bound():
    given, meta, gradient = setting()
    check_slope_of_bound(gradient, meta, given.task())


def test_without_support_samples_there_is_no_divergence():
    given, meta, _ = setting()
    empty = given.task(0, 0, 3)
    losses = [setting(kl_weight=kl, hyperprior_weight=0.0)[2](meta, empty).loss for kl in (0.0, 1.0)]
    assert torch.equal(*losses)
    grads = setting(hyperprior_weight=1.0)[2](meta, empty).grads
    assert all(grad.isfinite().all() for grad in join_parts(grads).values())


def test_the_hyperprior_alone_is_highest_at_0_and_a_deviation_of_a_tenth():
    given, meta, _ = setting()
    task = given.task(0, 0, 3)
    best = om.Meta(
        {n: torch.zeros_like(w) for n, w in meta.weights.items()},
        {n: torch.full_like(v, 0.1).log() for n, v in meta.rule.items()},
    )
    grads = [setting(hyperprior_weight=weight)[2](best, task).grads for weight in (0.0, 5.0)]
    without, hyper = map(join_parts, grads)
    for name, value in without.items():
        torch.testing.assert_close(hyper[name], value, rtol=0, atol=1e-12, msg=name)


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"rule": om.rules.sgd()}, {}, "needs an inner rule that adapts a normal distribution .* bayes_by_gradient"),
        ({"begin": "fresh"}, {}, 'with begin = "fresh" each task draws its own'),
        ({}, {"kl_weight": -0.1}, "kl_weight is -0.1: it is 0 or more"),
        ({}, {"hyperprior_weight": float("nan")}, "hyperprior_weight is nan: it is 0 or more"),
    ],
)
def test_what_it_cannot_differentiate_is_refused(change, options, message):
    fields = {"loss": lambda params, batch: params["w"].sum(), "rule": om.rules.bayes_by_gradient(), **change}
    with pytest.raises(ValueError, match=message):
        om.hierarchical_variational(om.Inner(**fields), **options)
