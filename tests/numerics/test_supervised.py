import pytest
import torch

import online_meta as om
from online_meta.testing.compare import assert_close
from online_meta.testing.oracle import CRITERIA
from tests.numerics.problems import MODELS, problem


@pytest.mark.parametrize("name", MODELS)
def test_supervised_is_the_gradient_of_the_joint_loss(name):
    module, loss, make_task = given = problem(name)
    inner = om.Inner(om.model_loss(module, loss), om.rules.sgd(lr=0.1), 5)
    task = make_task()
    found = om.supervised(inner)(inner.init(given.weights()), task)
    x, y = torch.cat([task.support.x, task.query.x]), torch.cat([task.support.y, task.query.y])
    right = CRITERIA[loss](module(x), y)
    right.backward()
    assert_close(found.grads.weights, {name: w.grad for name, w in module.named_parameters()}, 1e-10)
    torch.testing.assert_close(found.loss, right.detach(), rtol=1e-12, atol=0)
