"""The evidence lower bound against the evidence itself, and against the bound written out in plain autograd."""

import math
from functools import partial

import pytest
import torch
from torch.distributions import MultivariateNormal, Normal, kl_divergence
from torch.func import functional_call

import online_meta as om
from online_meta.functional import normals
from online_meta.functional.keyed import keyed, normal_like_all
from online_meta.testing.compare import assert_close
from online_meta.testing.oracle import CRITERIA
from tests.numerics.linear_gaussian import NOISE, PRIOR, draw_sigma_points, setting
from tests.numerics.problems import problem
from tests.numerics.reference_loop import check_slope_of_bound, join_parts, shifted

STEPS, LR = 3, 0.1


def platipus_setting(name="mlp_tanh", **options):
    given = problem(name)
    inner = om.Inner(om.model_loss(given.module, given.loss), om.rules.platipus(lr=LR, log_std=-1.5), STEPS)
    meta = inner.init(given.weights())
    return given, inner, om.Meta(meta.weights, shifted(meta.rule)), om.variational(inner, **options)


def write_out(given, meta, task, kl_weight, draws):
    """Return algorithm 1 of PLATIPUS and its gradient, in one graph of plain autograd."""
    leaves = om.Meta(*({n: v.detach().clone().requires_grad_() for n, v in part.items()} for part in meta))
    mu, rule = leaves

    def loss(weights, batch):
        return CRITERIA[given.loss](functional_call(given.module, weights, (batch.x,)), batch.y)

    def descend(weights, batch, rate):
        grads = torch.autograd.grad(loss(weights, batch), [*weights.values()], create_graph=True)
        return {n: w - rate * grad for (n, w), grad in zip(weights.items(), grads, strict=True)}

    def believe(part, batch):
        mean = descend(mu, batch, rule[f"{part}.log_rate"].exp())
        return {n: Normal(m, rule[f"{part}.{n}.log_std"].exp()) for n, m in mean.items()}

    q, p = believe("posterior", task.query), believe("prior", task.support)
    bound = kl_weight / len(task.query.x) * sum(kl_divergence(q[n], p[n]).sum() for n in mu)
    for draw in range(draws):
        with keyed(task.query, draw, "posterior"):
            noise = normal_like_all(mu)
        phi = {n: q[n].mean + q[n].stddev * noise[n] for n in mu}
        for _ in range(STEPS - 1):
            phi = descend(phi, task.support, LR)
        bound = bound + loss(phi, task.query) / draws
    given_to = [*mu.values(), *rule.values()]
    grads = iter(torch.autograd.grad(bound, given_to))
    return om.MetaGrad(bound.detach(), om.Meta(*({n: next(grads) for n in part} for part in leaves)))


@pytest.mark.parametrize("draws", [1, 2])
@pytest.mark.parametrize("name", ["mlp_tanh", "conv_group_norm"])
def test_the_bound_of_platipus_is_that_of_its_algorithm(name, draws):
    given, _, meta, gradient = platipus_setting(name, kl_weight=0.3, draws=draws)
    task = given.task()
    found, right = gradient(meta, task), write_out(given, meta, task, 0.3, draws)
    torch.testing.assert_close(found.loss, right.loss, rtol=1e-12, atol=0)
    assert_close(join_parts(found.grads), join_parts(right.grads), 1e-10)


def latent_setting(name="mlp_context", prior="support", **options):
    given = problem(name)
    rule = om.rules.encode(lr=LR, width=5, latent=True, prior=prior)
    inner = om.Inner(om.model_loss(given.module, given.loss), rule, 1, ("context",))
    meta = inner.init(given.weights())
    return given, inner, om.Meta(meta.weights, shifted(meta.rule)), om.variational(inner, **options)


statistician_setting = partial(latent_setting, prior="standard")


@pytest.mark.parametrize(
    "make", [platipus_setting, latent_setting, statistician_setting], ids=["platipus", "latent", "statistician"]
)
def test_the_gradient_is_the_slope_of_the_bound(make):
    given, _, meta, gradient = make(kl_weight=0.5)
    check_slope_of_bound(gradient, meta, given.task())


def test_at_its_optimum_the_bound_is_the_evidence_and_q_the_posterior(monkeypatch):
    """With orthogonal inputs, one rate and one deviation for each entry suffice for the posterior of q."""
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, -1.0]], dtype=torch.float64)
    draws = draw_sigma_points(monkeypatch, 2)
    inner, weights, y = setting(x, om.rules.platipus(log_std=math.log(PRIOR)), 1)
    meta = inner.init(weights)
    precision = 2 / NOISE**2 + 1 / PRIOR**2
    best = {
        "prior.log_rate": torch.tensor(
            -60.0, dtype=torch.float64
        ),  # the prior is N(mu, PRIOR^2), whatever the support set
        "posterior.log_rate": torch.tensor(math.log(len(x) / precision), dtype=torch.float64),
        "posterior.weight.log_std": torch.full((1, 2), -0.5 * math.log(precision), dtype=torch.float64),
    }
    meta = om.Meta(meta.weights, {**meta.rule, **best})
    loss, grads = om.variational(inner, draws=draws)(meta, om.Task(om.Batch(x, y + 1.0), om.Batch(x, y)))

    mu = meta.weights["weight"].clone().requires_grad_()
    prior = meta.rule["prior.weight.log_std"].clone().requires_grad_()
    covariance = NOISE**2 * torch.eye(4, dtype=torch.float64) + x @ (2 * prior).exp().flatten().diag() @ x.T
    evidence = -MultivariateNormal((x @ mu.T).flatten(), covariance).log_prob(y.flatten()) / len(x)
    torch.testing.assert_close(loss, evidence.detach(), rtol=1e-12, atol=0)
    for name in best:
        torch.testing.assert_close(grads.rule[name], torch.zeros_like(best[name]), rtol=0, atol=1e-12)
    of_mu, of_prior = torch.autograd.grad(evidence, (mu, prior))
    torch.testing.assert_close(grads.weights["weight"], of_mu, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(grads.rule["prior.weight.log_std"], of_prior, rtol=1e-10, atol=1e-12)


def test_training_draws_other_numbers_than_the_rule_where_support_and_query_are_equal(monkeypatch):
    given, _, meta, gradient = latent_setting(draws=2)
    seen = []

    def note(tensors):
        seen.append(normal_like_all(tensors))
        return seen[-1]

    monkeypatch.setattr(normals, "normal_like_all", note)
    batch = given.task().support
    gradient(meta, om.Task(batch, batch))
    of_q, of_start = [one["context"] for one in seen[:2]]
    assert len({float(one["context"][0]) for one in seen}) == 3, "two draws of q, and one of the start"
    assert not torch.equal(of_q, of_start)


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"rule": om.rules.sgd()}, {}, "needs an inner rule that draws .*: platipus, or encode with latent"),
        ({"steps": 0}, {}, "inner.steps is 0: this rule draws in its first step"),
        ({"begin": "fresh"}, {}, 'begin = "fresh" has none'),
        ({}, {"kl_weight": -0.1}, "kl_weight is -0.1: it is 0 or more"),
        ({}, {"draws": 0}, "draws is 0: it is 1 or more"),
    ],
)
def test_what_it_cannot_differentiate_is_refused(change, options, message):
    fields = {"loss": lambda params, batch: params["w"].sum(), "rule": om.rules.platipus(), "steps": 1, **change}
    with pytest.raises(ValueError, match=message):
        om.variational(om.Inner(**fields), **options)


def test_an_empty_support_set_gives_the_prior_of_platipus():
    given, inner, meta, gradient = platipus_setting()
    empty = given.task(0, 0, 3)
    adapted = [inner.adapt(meta, empty.support), om.Inner(inner.loss, inner.rule, 0).adapt(meta, empty.support)]
    assert all(torch.equal(adapted[0][n], adapted[1][n]) for n in meta.weights)
    assert not any(torch.equal(adapted[0][n], meta.weights[n]) for n in meta.weights)
    assert all(grad.isfinite().all() for grad in join_parts(gradient(meta, empty).grads).values())
