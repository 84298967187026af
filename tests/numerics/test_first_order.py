import pytest
import torch

import online_meta as om
from online_meta.testing.compare import assert_close, relative_error
from online_meta.testing.oracle import unrolled_maml
from tests.numerics.problems import EVERY, problem

LR = 0.1


@pytest.mark.parametrize("steps", [0, 1, 5])
@pytest.mark.parametrize("name", EVERY)
def test_first_order_holds_the_inner_gradients_constant(name, steps):
    module, loss, make_task = given = problem(name)
    inner = om.Inner(om.model_loss(module, loss), om.rules.sgd(lr=LR), steps)
    found = om.first_order(inner)(inner.init(given.weights()), make_task())
    right = unrolled_maml(module, loss, given.weights(), make_task(), lr=LR, steps=steps, constant_gradients=True)
    assert_close(found.grads.weights, right.grads.weights, 1e-10)
    torch.testing.assert_close(found.loss, right.loss, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", EVERY)
def test_first_order_is_not_exact(name):
    module, loss, make_task = given = problem(name)
    inner = om.Inner(om.model_loss(module, loss), om.rules.sgd(lr=LR), 5)
    meta = inner.init(given.weights())
    found, exact = (gradient(inner)(meta, make_task()) for gradient in (om.first_order, om.exact))
    assert torch.equal(found.loss, exact.loss)
    assert relative_error(found.grads.weights, exact.grads.weights) > 1e-3


def test_first_order_ignores_the_influence_of_slow_weights_on_inner_gradients():
    module, loss, make_task = given = problem("mlp_tanh")
    inner = om.Inner(om.model_loss(module, loss), om.rules.sgd(lr=LR), 5, ("head.*",))
    found = om.first_order(inner)(inner.init(given.weights()), make_task())
    right = unrolled_maml(
        module, loss, given.weights(), make_task(), lr=LR, steps=5, fast=("head.*",), constant_gradients=True
    )
    assert_close(found.grads.weights, right.grads.weights, 1e-10)
