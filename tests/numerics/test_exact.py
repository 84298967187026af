import pytest
import torch

import online_meta as om
from online_meta.inner import query_loss
from online_meta.testing.compare import assert_close, flat, relative_error
from online_meta.testing.oracle import central_difference, unrolled_maml
from tests.numerics.problems import EVERY, problem

LR = 0.1
STEPS = (0, 1, 5)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("name", EVERY)
def test_exact_is_the_gradient_of_the_unrolled_loop(name, steps):
    module, loss, make_task = given = problem(name)
    inner = om.Inner(om.model_loss(module, loss), om.rules.sgd(lr=LR), steps)
    for seed in range(3):
        found = om.exact(inner)(inner.init(given.weights()), make_task(seed))
        right = unrolled_maml(module, loss, given.weights(), make_task(seed), lr=LR, steps=steps)
        assert_close(found.grads.weights, right.grads.weights, 1e-10)
        torch.testing.assert_close(found.loss, right.loss, rtol=1e-12, atol=0)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("name", EVERY)
def test_exact_is_the_slope_of_the_adapted_loss(name, steps):
    module, loss, make_task = given = problem(name)
    inner = om.Inner(om.model_loss(module, loss), om.rules.sgd(lr=LR), steps)
    weights, task = given.weights(), make_task()
    found = om.exact(inner)(inner.init(weights), task)
    for seed in range(3):
        random = torch.Generator().manual_seed(seed)
        along = {n: torch.randn(w.shape, generator=random, dtype=w.dtype) for n, w in weights.items()}

        def adapted_loss(weights):
            meta = om.Meta(weights, {})
            return query_loss(inner, meta, inner.adapt(meta, task.support), task.query)

        slope = central_difference(adapted_loss, weights, along)
        assert float(flat(found.grads.weights) @ flat(along)) == pytest.approx(slope, rel=1e-6, abs=1e-7)


@pytest.mark.parametrize("fast", [("head.*",), ("body.*",), ("body.0.weight", "head.bias")])
@pytest.mark.parametrize("name", ["mlp_tanh", "conv_group_norm"])
def test_slow_weights_get_exact_gradients_too(name, fast):
    module, loss, make_task = given = problem(name)
    inner = om.Inner(om.model_loss(module, loss), om.rules.sgd(lr=LR), 4, fast)
    found = om.exact(inner)(inner.init(given.weights()), make_task())
    right = unrolled_maml(module, loss, given.weights(), make_task(), lr=LR, steps=4, fast=fast)
    assert_close(found.grads.weights, right.grads.weights, 1e-10)
    everything = unrolled_maml(module, loss, given.weights(), make_task(), lr=LR, steps=4)
    assert relative_error(found.grads.weights, everything.grads.weights) > 1e-3


def test_slow_weights_do_not_adapt():
    module, loss, make_task = given = problem("mlp_tanh")
    inner = om.Inner(om.model_loss(module, loss), om.rules.sgd(lr=LR), 4, ("head.*",))
    weights = given.weights()
    adapted = inner.adapt(inner.init(weights), make_task().support)
    assert list(adapted) == list(weights)
    for name, weight in weights.items():
        assert torch.equal(adapted[name], weight) is not name.startswith("head.")


def test_an_unknown_glob_is_refused_with_the_names_of_the_weights():
    module, loss, _ = given = problem("mlp_tanh")
    inner = om.Inner(om.model_loss(module, loss), om.rules.sgd(), 1, ("tail.*",))
    with pytest.raises(ValueError, match=r"'tail\.\*' matches none of the weights \['body\.0\.bias'"):
        inner.init(given.weights())


def test_a_negative_number_of_steps_is_refused():
    module, loss, _ = problem("mlp_tanh")
    with pytest.raises(ValueError, match="steps is -1"):
        om.Inner(om.model_loss(module, loss), om.rules.sgd(), -1)
