"""A meta-step next to the formulas of Adam (Kingma & Ba, 2015) and AdamW (Loshchilov & Hutter, 2019), in NumPy."""

import math

import numpy as np
import pytest
import torch

import online_meta as om

SHAPES = {"a.weight": (40, 3), "a.bias": (40,), "b.weight": (1, 40), "b.bias": (1,)}
LR, CLIP, WEIGHT = 0.02, 0.7, 3.0
OPTIONS = [
    ("adam", {}),
    ("adam", {"betas": (0.8, 0.95), "eps": 1e-4}),
    ("adam", {"weight_decay": 0.1}),
    ("adamw", {"weight_decay": 0.1}),
]


def make_start():
    random = torch.Generator().manual_seed(1)
    return {name: torch.randn(shape, generator=random, dtype=torch.float64) for name, shape in SHAPES.items()}


def make_sums(count):
    """Return sums of gradients, of which every third one is short enough not to be clipped."""
    random = torch.Generator().manual_seed(2)
    for step in range(count):
        scale = 0.01 if step % 3 == 2 else 1.0
        yield {
            name: scale * torch.randn(shape, generator=random, dtype=torch.float64) for name, shape in SHAPES.items()
        }


def step_by_hand(weights, sums, name, options):
    """Return the weights after Adam's steps, and the norms before clipping."""
    beta1, beta2 = options.get("betas", (0.9, 0.999))
    eps, decay = options.get("eps", 1e-8), options.get("weight_decay", 0.0)
    first, second = np.zeros_like(weights), np.zeros_like(weights)
    norms = []
    for count, total in enumerate(sums, 1):
        grad = total / WEIGHT
        norms.append(math.sqrt((grad**2).sum()))
        grad = grad * min(1.0, CLIP / norms[-1])
        if name == "adamw":
            weights = weights * (1 - LR * decay)
        else:
            grad = grad + decay * weights
        first, second = beta1 * first + (1 - beta1) * grad, beta2 * second + (1 - beta2) * grad**2
        corrected = np.sqrt(second / (1 - beta2**count))
        weights = weights - LR * first / (1 - beta1**count) / (corrected + eps)
    return weights, norms


def join(tensors):
    return np.concatenate([tensors[name].numpy().ravel() for name in SHAPES])


def play(engine, sums):
    return [
        engine.apply(om.MetaGrad(torch.ones((), dtype=torch.float64), om.Meta(one, {})), WEIGHT).norm for one in sums
    ]


@pytest.mark.parametrize(("name", "options"), OPTIONS)
def test_steps_follow_the_formulas(name, options):
    engine = om.MetaOptimizer(om.Meta(make_start(), {}), name, LR, CLIP, options)
    norms = play(engine, make_sums(12))
    right, right_norms = step_by_hand(join(make_start()), map(join, make_sums(12)), name, options)
    np.testing.assert_allclose(join(engine.meta().weights), right, rtol=1e-11, atol=1e-13)
    np.testing.assert_allclose(norms, right_norms, rtol=1e-12)
    assert min(right_norms) < CLIP < max(right_norms)


def test_a_loaded_engine_continues_to_the_bit():
    make = lambda: om.MetaOptimizer(om.Meta(make_start(), {}), "adam", LR, CLIP)  # noqa: E731
    sums = [*make_sums(10)]
    whole, first, rest = make(), make(), make()
    play(whole, sums)
    play(first, sums[:4])
    play(rest, sums[7:])  # Its own state must not survive.
    rest.load(first.save())
    play(rest, sums[4:])
    assert all(torch.equal(value, whole.save()[name]) for name, value in rest.save().items())


def test_gradients_in_another_order_and_in_inference_mode_change_nothing():
    plain, other = (om.MetaOptimizer(om.Meta(make_start(), {}), "adam", LR, CLIP) for _ in range(2))
    play(plain, make_sums(5))
    with torch.inference_mode():
        play(other, [dict(reversed(one.items())) for one in make_sums(5)])
    assert all(torch.equal(value, plain.save()[name]) for name, value in other.save().items())
    play(plain, make_sums(1))
    play(other, make_sums(1))
    assert all(torch.equal(value, plain.save()[name]) for name, value in other.save().items())


def test_a_step_that_is_not_finite_changes_nothing():
    engine = om.MetaOptimizer(om.Meta(make_start(), {}), "adam", LR, CLIP)
    play(engine, make_sums(3))
    before = engine.save()
    (spoilt,) = make_sums(1)
    spoilt["b.bias"][:] = math.inf
    one = om.Meta(spoilt, {})
    assert engine.apply(om.MetaGrad(torch.ones(()), one), WEIGHT).skipped == "not_finite"
    (good,) = make_sums(1)
    assert engine.apply(om.MetaGrad(torch.tensor(math.nan), om.Meta(good, {})), WEIGHT).skipped == "not_finite"
    assert engine.apply(om.MetaGrad(torch.ones(()), om.Meta(good, {})), 0.0).skipped == "not_finite"
    assert all(torch.equal(value, before[name]) for name, value in engine.save().items())
