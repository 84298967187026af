import pytest
import torch

import online_meta as om
from online_meta.testing.compare import assert_close
from online_meta.testing.oracle import unrolled_reptile
from tests.numerics.problems import MODELS, problem

LR = 0.1


@pytest.mark.parametrize("steps", [0, 1, 5])
@pytest.mark.parametrize("name", MODELS)
def test_reptile_is_the_start_minus_the_end_of_sgd(name, steps):
    module, loss, make_task = given = problem(name)
    inner = om.Inner(om.model_loss(module, loss), om.rules.sgd(lr=LR), steps)
    found = om.reptile(inner)(inner.init(given.weights()), make_task())
    assert_close(found.grads.weights, unrolled_reptile(module, loss, make_task(), lr=LR, steps=steps), 1e-10)


def test_reptile_is_zero_for_slow_weights_and_the_rule():
    module, loss, make_task = given = problem("mlp_tanh")
    inner = om.Inner(om.model_loss(module, loss), om.rules.sgd(lr=LR), 3, ("head.*",))
    meta = inner.init(given.weights())._replace(rule={"rate": torch.ones(2, dtype=torch.float64)})
    found = om.reptile(inner)(meta, make_task())
    assert torch.equal(found.grads.rule["rate"], torch.zeros(2, dtype=torch.float64))
    assert {name for name, grad in found.grads.weights.items() if grad.any()} == {"head.weight", "head.bias"}


def test_subtracting_the_whole_direction_gives_the_adapted_weights():
    module, loss, make_task = given = problem("mlp_tanh")
    inner = om.Inner(om.model_loss(module, loss), om.rules.sgd(lr=LR), 3)
    meta, task = inner.init(given.weights()), make_task()
    everything = om.Batch(*(torch.cat(pair) for pair in zip(task.support, task.query, strict=True)))
    found = om.reptile(inner)(meta, task)
    moved = {name: weight - found.grads.weights[name] for name, weight in meta.weights.items()}
    adapted = inner.adapt(meta, everything)
    assert_close(moved, adapted, 1e-14)
    assert torch.equal(found.loss, inner.loss(adapted, task.query))
