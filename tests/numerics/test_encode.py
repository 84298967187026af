"""Neural processes: what an encoder makes of a support set, in which order and how often, and its exact gradient."""

import math
from itertools import cycle

import pytest
import torch
from torch import nn
from torch.distributions import MultivariateNormal, Normal, kl_divergence
from torch.func import functional_call
from torch.nn import functional as F

import online_meta as om
from online_meta.batching.padding import pad_task
from online_meta.functional import normals
from online_meta.functional.keyed import keyed, normal_like
from online_meta.inner import init_carry, run_inner_loop
from online_meta.rules.encode import _fold as fold
from online_meta.testing.compare import assert_close, relative_error
from tests.numerics.problems import regression_task
from tests.numerics.reference_loop import join_parts, shifted
from trainers.models import attentive_decoder, in_context_transformer, mlp
from trainers.models.decoders import look_up

KINDS = {
    "conditional": {},
    "latent": {"latent": True},
    "latent, standard": {"latent": True, "prior": "standard", "pooled_depth": 1},
    "attentive": {"attention": True},
    "attentive and latent": {"attention": True, "latent": True},
    "in context": {"in_context": True},
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def make(kind, inputs=4, targets=2, steps=0, **options):
    """Return the inner loop of a small neural process in float64, its meta-parameters and its module."""
    torch.manual_seed(0)
    chosen = {"width": 6, **KINDS[kind], **options}
    if "in_context" in chosen:
        module = in_context_transformer(inputs, 2 * targets, width=4, heads=2, layers=2)
    elif "attention" in chosen:
        module = attentive_decoder(inputs, 2 * targets, hidden=(5,), width=3, context=2 if "latent" in chosen else 0)
    else:
        module = mlp(inputs, 2 * targets, hidden=(5,), context=3)
    module = module.double()
    with torch.no_grad():
        for weight in module.parameters():
            weight.add_(0.3 * torch.randn_like(weight))
    fast = {"attentive": ("keys", "values"), "in context": ("rows",)}.get(kind, ("*context", "keys", "values"))
    inner = om.Inner(
        om.model_loss(module, "gaussian"),
        om.rules.encode(lr=0.1, **chosen),
        steps,
        ("context",) if kind in ("conditional", "latent", "latent, standard") else fast,
        posterior=om.posteriors.samples() if "latent" in chosen else om.posteriors.point(),
        samples=3 if "latent" in chosen else 1,
    )
    meta = inner.init(dict(module.named_parameters()))
    return inner, om.Meta(meta.weights, shifted(meta.rule)), module


def believe_without_draws(inner, meta, support, monkeypatch):
    """Return phi_0 where each draw is one deviation above its mean."""
    with monkeypatch.context() as patch:
        patch.setattr(
            "online_meta.functional.normals.normal_like_all",
            lambda tensors: {name: torch.ones_like(value) for name, value in tensors.items()},
        )
        return init_carry(inner, meta, support).phi


def answer(inner, meta, phi, x):
    return inner.loss.output({**meta.weights, **phi}, x)


@every_kind
def test_the_order_of_the_support_set_does_not_matter(kind, monkeypatch):
    inner, meta, _ = make(kind)
    task = regression_task()
    order = torch.tensor([3, 1, 4, 0, 2])
    permuted = om.Batch(task.support.x[order], task.support.y[order])
    found, right = (
        answer(inner, meta, believe_without_draws(inner, meta, batch, monkeypatch), task.query.x)
        for batch in (permuted, task.support)
    )
    torch.testing.assert_close(found, right, rtol=1e-12, atol=1e-12)
    other = om.Batch(task.support.x[order], task.support.y)
    changed = answer(inner, meta, believe_without_draws(inner, meta, other, monkeypatch), task.query.x)
    assert not torch.allclose(changed, right, rtol=1e-3)


@every_kind
def test_a_weight_counts_as_so_many_samples_and_padding_does_not_count(kind, monkeypatch):
    inner, meta, _ = make(kind)
    task = regression_task()
    twice = om.Batch(*(torch.cat([part, part[:2]]) for part in task.support))
    weight = torch.tensor([2.0, 2.0, 1.0, 1.0, 1.0], dtype=torch.float64)
    found, right, padded = (
        answer(inner, meta, believe_without_draws(inner, meta, batch, monkeypatch), task.query.x)
        for batch in (task.support._replace(weight=weight), twice, pad_task(om.Task(twice, task.query), (11, 4), {})[0])
    )
    torch.testing.assert_close(found, right, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(padded, right, rtol=1e-12, atol=1e-12)


@every_kind
def test_an_empty_support_set_gives_the_prior_predictive(kind, monkeypatch):
    inner, meta, _ = make(kind, steps=2)
    nothing = regression_task(0, 0, 4)
    believed = believe_without_draws(inner, meta, nothing.support, monkeypatch)
    mean = {name: value for name, value in believed.items() if not name.endswith("context") or "latent" not in kind}
    assert all(torch.equal(value, meta.weights[name]) for name, value in mean.items())
    for name in believed.keys() - mean.keys():
        spread = 0.1 + 0.9 * meta.rule[f"{name}.spread.bias"].sigmoid()
        prior = torch.ones_like(spread) if "standard" in kind else meta.weights[name] + spread
        torch.testing.assert_close(believed[name], prior, rtol=1e-12, atol=0)
    (belief,) = inner.believe(meta, nothing.support)
    assert all(value.isfinite().all() for value in belief.params.values())
    found = om.exact(inner)(meta, nothing)
    assert all(grad.isfinite().all() for grad in join_parts(found.grads).values())


def test_attention_on_a_support_point_with_identity_keys_returns_its_value():
    values = torch.randn(4, 3, dtype=torch.float64)
    keys = torch.cat([1e3 * torch.eye(4, dtype=torch.float64), torch.zeros(4, 1, dtype=torch.float64)], 1)
    assert torch.equal(look_up(torch.eye(4, dtype=torch.float64), keys, values), values)
    keys[2, -1] = -1e4
    assert not torch.equal(look_up(torch.eye(4, dtype=torch.float64), keys, values)[2], values[2])


class DeepSet(nn.Module):
    """A network of each sample, the mean, and perhaps a layer after it."""

    def __init__(self, pooled):
        super().__init__()
        self.samples = nn.Sequential(nn.Linear(2, 6), nn.GELU(), nn.Linear(6, 6), nn.GELU())
        self.pooled = nn.Sequential(nn.Linear(6, 6), nn.GELU()) if pooled else nn.Identity()

    def forward(self, samples):
        return self.pooled(self.samples(samples).mean(0))


def plain_setting(kind):
    """Return a small problem of one number of x and y, and the network h written as torch's own layers."""
    inner, meta, module = make(kind, inputs=1, targets=1, features=1, depth=2)
    random = torch.Generator().manual_seed(1)
    task = om.Task(*(om.Batch(*torch.randn(2, n, 1, generator=random, dtype=torch.float64)) for n in (5, 7)))
    pooled = "pooled_depth" in KINDS[kind]
    encoder = DeepSet(pooled).double()
    layers = {"samples.0": "samples.0", "samples.2": "samples.1", **({"pooled.0": "pooled.0"} if pooled else {})}
    names = {f"{own}.{part}": f"{rule}.{part}" for own, rule in layers.items() for part in ("weight", "bias")}
    leaves = {n: v.clone().requires_grad_() for n, v in join_parts(meta).items()}

    def code(*batches):
        samples = torch.cat([torch.cat([batch.x, batch.y], 1) for batch in batches])
        return functional_call(encoder, {own: leaves[f"rule/{n}"] for own, n in names.items()}, samples)

    def loss(context):
        weights = {n: leaves[f"weights/{n}"] for n in meta.weights} | {"context": context}
        mean, raw = functional_call(module, weights, task.query.x).chunk(2, 1)
        return -Normal(mean, 1e-3 + F.softplus(raw, threshold=40.0)).log_prob(task.query.y).mean()

    return inner, meta, task, leaves, code, loss


def compare(found, loss, leaves):
    torch.testing.assert_close(found.loss, loss.detach(), rtol=1e-12, atol=0)
    grads = torch.autograd.grad(loss, [*leaves.values()])
    assert_close(join_parts(found.grads), dict(zip(leaves, grads, strict=True)), 1e-12)


def test_a_conditional_neural_process_is_the_plain_network():
    """A deep set of (x, y), and a perceptron of x and the mean."""
    inner, meta, task, leaves, code, loss = plain_setting("conditional")
    context = leaves["weights/context"] + leaves["rule/context.mean.weight"] @ code(task.support)
    compare(om.exact(inner)(meta, task), loss(context), leaves)


def believe(leaves, r):
    """Return the normal distribution that is made of the mean r of what is encoded."""
    raw = leaves["rule/context.spread.bias"] + leaves["rule/context.spread.weight"] @ r
    return Normal(leaves["weights/context"] + leaves["rule/context.mean.weight"] @ r, 0.1 + 0.9 * raw.sigmoid())


def draw(q, query):
    """Draw as training does."""
    with keyed(query, 0, "posterior"):
        return q.mean + q.stddev * normal_like(q.mean.detach())


def test_the_bound_of_a_neural_process_is_that_of_its_paper():
    """q(z | D, D') is given both sets, and p is q(z | D)."""
    inner, meta, task, leaves, code, loss = plain_setting("latent")
    q, p = (believe(leaves, code(*batches)) for batches in (task, [task.support]))
    bound = loss(draw(q, task.query)) + 0.5 / 7 * kl_divergence(q, p).sum()
    compare(om.variational(inner, kl_weight=0.5)(meta, task), bound, leaves)


def test_the_bound_of_a_neural_statistician_is_that_of_its_paper():
    """q(c | D') is given the query set alone, and p is N(0, I)."""
    inner, meta, task, leaves, code, loss = plain_setting("latent, standard")
    q, p = believe(leaves, code(task.query)), Normal(*torch.tensor([[0.0] * 3, [1.0] * 3], dtype=torch.float64))
    bound = loss(draw(q, task.query)) + kl_divergence(q, p).sum() / 7
    compare(om.variational(inner)(meta, task), bound, leaves)


def test_the_bound_of_a_neural_statistician_is_the_evidence_where_its_belief_is_exact(monkeypatch):
    """y_i = a c + b + noise: q(c | D') is normal with precision 1 + n a^2 / s^2 and mean a sum_i (y_i - b) / s^2 / it.

    With a bias of 50, the hidden unit of the encoder is linear.
    """
    a, b, s, n = 0.8, -0.4, 0.9, 5
    rule = om.rules.encode(width=1, depth=1, features=1, latent=True, prior="standard")
    module = mlp(1, 1, hidden=(), context=1).double()
    inner = om.Inner(om.model_loss(module, "gaussian_of_noise", loss_options={"sigma": s}), rule, 0, ("context",))
    precision = 1 + n * a**2 / s**2
    slope, spread = n * a / s**2 / precision, (precision**-0.5 - 0.1) / 0.9
    rule_parameters = {
        "samples.0.weight": [[0.0, 1.0]],
        "samples.0.bias": [50.0],
        "context.mean.weight": [[slope]],
        "context.spread.weight": [[0.0]],
        "context.spread.bias": [math.log(spread / (1 - spread))],
    }
    weights = {"context": [-slope * (50 + b)], "1.weight": [[0.3, a]], "1.bias": [b]}
    meta = om.Meta(
        *(
            {name: torch.tensor(value, dtype=torch.float64) for name, value in part.items()}
            for part in (weights, rule_parameters)
        )
    )
    y = torch.randn(n, 1, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    query, support = (om.Batch(torch.zeros_like(one), one) for one in (y, torch.ones(2, 1).double()))
    turns = cycle([1.0, 0.0, -1.0, 0.0])  # Every other draw is of the start, from the support set.
    monkeypatch.setattr(
        normals, "normal_like_all", lambda tensors: {n: torch.full_like(v, next(turns)) for n, v in tensors.items()}
    )
    found = om.variational(inner, draws=2)(meta, om.Task(support, query))
    leaves = [torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (a, b)]
    one = torch.ones(n, dtype=torch.float64)
    covariance = s**2 * one.diag() + leaves[0] ** 2 * torch.outer(one, one)
    evidence = -MultivariateNormal(leaves[1] * one, covariance).log_prob(y[:, 0]) / n
    torch.testing.assert_close(found.loss, evidence.detach(), rtol=1e-10, atol=0)
    of_a, of_b = torch.autograd.grad(evidence, leaves)
    torch.testing.assert_close(found.grads.weights["1.weight"][0, 1], of_a, rtol=1e-9, atol=0)
    torch.testing.assert_close(found.grads.weights["1.bias"][0], of_b, rtol=1e-9, atol=0)
    for name in ("context.mean.weight", "context.spread.bias"):  # At the best q, the bound has no slope.
        torch.testing.assert_close(found.grads.rule[name], torch.zeros_like(found.grads.rule[name]), rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("kind", "batching"), [*((kind, "vmap") for kind in KINDS), ("attentive and latent", "traced")]
)
def test_tasks_are_computed_together(kind, batching):
    inner, meta, _ = make(kind, steps=1)
    for estimator in (om.exact, om.variational) if "latent" in kind else (om.exact,):
        together, one_by_one = (om.over_tasks(estimator(inner), how) for how in (batching, "loop"))
        for seeds in (range(3), range(3, 6)):
            batch = [regression_task(seed) for seed in seeds]
            found, right = together(meta, batch), one_by_one(meta, batch)
            torch.testing.assert_close(found.loss, right.loss, rtol=1e-12, atol=0)
            assert relative_error(join_parts(found.grads), join_parts(right.grads)) < 1e-10


def test_samples_of_a_latent_code_differ_and_those_of_a_task_are_the_same_again():
    inner, meta, _ = make("latent")
    support = regression_task().support
    (first,), (again,) = inner.believe(meta, support), inner.believe(meta, support)
    assert torch.equal(first.params["context"], again.params["context"])
    assert len({tuple(one.tolist()) for one in first.params["context"]}) == 3


def test_steps_descend_from_the_code():
    inner, meta, _ = make("attentive", steps=4)
    task = regression_task()
    losses = [
        float(inner.loss({**meta.weights, **phi}, task.support))
        for phi in (init_carry(inner, meta, task.support).phi, run_inner_loop(inner, meta, task.support).phi)
    ]
    assert losses[1] < losses[0]
    assert run_inner_loop(inner, meta, task.support).phi["keys"].shape == (1 + 5, 4)


def test_numbers_and_categories_are_told_apart_while_there_are_places():
    like = torch.zeros(1, dtype=torch.float64)
    x = torch.arange(1.0, 7.0).double().reshape(2, 3)
    torch.testing.assert_close(fold(x, 4, like) * 3**0.5, F.pad(x, (0, 1)))
    torch.testing.assert_close(fold(x, 2, like) * 3**0.5, torch.stack([x[:, 0] - x[:, 2], x[:, 1]], 1))
    assert torch.equal(fold(torch.tensor([0, 2, 5]), 4, like).argmax(1), torch.tensor([0, 2, 1]))
    assert torch.equal(fold(torch.tensor([[1, 1]]), 4, like) > 0, torch.tensor([[False, True, True, False]]))
    torch.testing.assert_close(
        fold(torch.full((1, 1), 51, dtype=torch.uint8), 1, like), torch.full((1, 1), 0.2).double()
    )
    both = fold({"a": x, "b": torch.tensor([0, 1])}, 4, like)
    torch.testing.assert_close(both, fold(x, 4, like) + fold(torch.tensor([0, 1]), 4, like))


@pytest.mark.parametrize(
    ("options", "fast", "message"),
    [
        ({"width": 0}, ("context",), "width is 0: it is 1 or more"),
        ({"features": 0}, ("context",), "features is 0: it is 1 or more"),
        ({"pooled_depth": -1}, ("context",), "pooled_depth is -1: it is 0 or more"),
        ({"latent": True, "prior": "normal"}, ("context",), "prior is 'normal': it is one of support, standard"),
        ({"prior": "standard"}, ("context",), "set latent = true"),
        ({"attention": True}, ("context",), r"needs weights keys .* missing.*attentive_decoder"),
        ({"attention": True, "latent": True}, ("keys", "values"), r"there are none: add them to fast"),
        ({"in_context": True, "features": 3}, ("context",), r"needs weights rows \(m, 7\) .* missing.*features = 3"),
    ],
)
def test_what_does_not_fit_is_refused(options, fast, message):
    module = attentive_decoder(1, 2, width=3) if "keys" in fast else mlp(1, 2, context=3)
    with pytest.raises(ValueError, match=message):
        om.Inner(om.model_loss(module, "gaussian"), om.rules.encode(**options), 0, fast).init(
            dict(module.named_parameters())
        )


def test_initial_parameters_follow_from_the_weights():
    inner, _, module = make("conditional")
    weights = {name: weight.detach() for name, weight in module.named_parameters()}
    first, again, other = (
        inner.init({name: weight + shift for name, weight in weights.items()}).rule for shift in (0.0, 0.0, 0.1)
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first if name.endswith("weight"))
