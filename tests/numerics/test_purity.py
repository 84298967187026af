import copy

import pytest
import torch
from torch.utils._pytree import tree_leaves

import online_meta as om
from tests.numerics.problems import MODELS, problem

ESTIMATORS = (om.exact, om.first_order, om.reptile, om.supervised)


def everything(inner, meta, task):
    """Return everything that the mathematics floor computes from meta-parameters and a task."""
    made = [gradient(inner)(meta, task) for gradient in ESTIMATORS]
    made += [om.over_tasks(gradient(inner))(meta, [task, task]) for gradient in ESTIMATORS]
    return [*made, inner.adapt(meta, task.support), inner.init(meta.weights)]


def snapshot(tensors):
    return [(t._version, t.requires_grad, t.grad, t.detach().clone()) for t in tensors]


def check_unchanged(tensors, before):
    for now, (version, requires_grad, grad, value) in zip(tensors, before, strict=True):
        assert now._version == version
        assert now.requires_grad is requires_grad
        assert now.grad is grad
        assert torch.equal(now, value)


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_arguments_are_not_modified_and_no_graph_leaks_out(name, requires_grad):
    module, loss, make_task = problem(name)
    inner = om.Inner(om.model_loss(module, loss), om.rules.sgd(lr=0.1), 3)
    module.requires_grad_(requires_grad)  # as the caller may have set it
    meta, task = om.Meta(dict(module.named_parameters()), {}), make_task()
    given = tree_leaves((meta, task))
    before, state, training = snapshot(given), copy.deepcopy(module.state_dict()), module.training
    leaves = tree_leaves(everything(inner, meta, task))
    assert leaves
    assert not any(leaf.requires_grad for leaf in leaves)
    check_unchanged(given, before)
    assert module.training is training
    assert state.keys() == module.state_dict().keys()
    assert all(torch.equal(value, module.state_dict()[key]) for key, value in state.items())


def test_results_share_no_memory_with_arguments():
    module, loss, make_task = given = problem("mlp_tanh")
    inner = om.Inner(om.model_loss(module, loss), om.rules.sgd(lr=0.1), 0, ("head.*",))
    weights = given.weights()
    owned = {weight.data_ptr() for weight in weights.values()}
    for made in (inner.init(weights), *(gradient(inner)(inner.init(weights), make_task()) for gradient in ESTIMATORS)):
        assert owned.isdisjoint(leaf.data_ptr() for leaf in tree_leaves(made))


def test_gradients_can_be_taken_while_grad_mode_is_off():
    module, loss, make_task = given = problem("mlp_tanh")
    inner = om.Inner(om.model_loss(module, loss), om.rules.sgd(lr=0.1), 3)
    meta = inner.init(given.weights())
    for gradient in ESTIMATORS:
        on = gradient(inner)(meta, make_task())
        with torch.no_grad():
            off = gradient(inner)(meta, make_task())
        assert all(torch.equal(a, b) for a, b in zip(tree_leaves(on), tree_leaves(off), strict=True))
