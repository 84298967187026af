import pytest
import torch

import online_meta as om
from online_meta.batching.task_sum import TaskSum
from online_meta.testing.compare import assert_close, relative_error
from online_meta.testing.oracle import unrolled_maml
from tests.numerics.problems import problem

LR, STEPS = 0.1, 3


@pytest.mark.parametrize("name", ["mlp_tanh", "conv_batch_norm"])
def test_the_mean_is_over_distinct_tasks_of_any_size(name):
    module, loss, make_task = given = problem(name)
    inner = om.Inner(om.model_loss(module, loss), om.rules.sgd(lr=LR), STEPS)
    tasks = [make_task(0, 5, 4), make_task(1, 9, 3), make_task(2, 6, 12), make_task(3, 7, 7)]
    found = om.over_tasks(om.exact(inner))(inner.init(given.weights()), tasks)
    each = [unrolled_maml(module, loss, given.weights(), task, lr=LR, steps=STEPS) for task in tasks]
    mean = {n: torch.stack([one.grads.weights[n] for one in each]).mean(0) for n in given.weights()}
    assert_close(found.grads.weights, mean, 1e-10)
    torch.testing.assert_close(found.loss, torch.stack([one.loss for one in each]).mean(), rtol=1e-12, atol=0)
    for one in each:
        assert relative_error(one.grads.weights, mean) > 1e-2


def test_the_mean_over_one_task_equals_that_task_bit_for_bit():
    module, loss, make_task = given = problem("mlp_tanh")
    inner = om.Inner(om.model_loss(module, loss), om.rules.sgd(lr=LR), STEPS)
    meta = inner.init(given.weights())
    mean, one = om.over_tasks(om.exact(inner))(meta, [make_task()]), om.exact(inner)(meta, make_task())
    assert all(torch.equal(mean.grads.weights[name], one.grads.weights[name]) for name in meta.weights)


def test_a_sum_weights_each_task():
    module, loss, make_task = given = problem("mlp_tanh")
    inner = om.Inner(om.model_loss(module, loss), om.rules.sgd(lr=LR), STEPS)
    meta = inner.init(given.weights())
    tasks, factors = [make_task(0), make_task(1), make_task(2)], [1.0, 0.25, 3.0]
    found = TaskSum(om.exact(inner))(meta, tasks, factors)
    each = [om.exact(inner)(meta, task) for task in tasks]
    right = {n: sum(f * g.grads.weights[n] for f, g in zip(factors, each, strict=True)) for n in meta.weights}
    assert_close(found.grads.weights, right, 1e-12)
    assert float(found.loss) == pytest.approx(sum(f * float(g.loss) for f, g in zip(factors, each, strict=True)))


def test_an_empty_list_of_tasks_is_refused():
    module, loss, _ = given = problem("mlp_tanh")
    inner = om.Inner(om.model_loss(module, loss), om.rules.sgd(lr=LR), STEPS)
    with pytest.raises(ValueError, match="one task or more"):
        om.over_tasks(om.exact(inner))(inner.init(given.weights()), [])


def test_fewer_weights_than_tasks_are_refused():
    module, loss, make_task = given = problem("mlp_tanh")
    inner = om.Inner(om.model_loss(module, loss), om.rules.sgd(lr=LR), STEPS)
    with pytest.raises(ValueError, match="shorter"):
        TaskSum(om.exact(inner))(inner.init(given.weights()), [make_task(0), make_task(1)], [1.0])
