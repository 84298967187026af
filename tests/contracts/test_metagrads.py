"""What every meta-gradient estimator of ``online_meta.metagrads`` keeps."""

import pytest
import torch
from torch.utils._pytree import tree_leaves

import online_meta as om
import online_meta.metagrads
from online_meta import registry
from tests.contracts.test_rules import EVERY, every_fast, every_rule, is_like, setting

ESTIMATORS = {name: registry.load(online_meta.metagrads, name) for name in registry.names(online_meta.metagrads)}
SEES_THE_QUERY = {"reptile"}
DOES_NOT_ADAPT = {"supervised"}

every_estimator = pytest.mark.parametrize("name", ESTIMATORS)


def everything(task):
    return om.Batch(*(torch.cat(pair) for pair in zip(task.support, task.query, strict=True)))


@pytest.mark.parametrize("model", ["mlp_tanh", "conv_group_norm"])
@every_fast
@every_rule
@every_estimator
def test_gradients_are_like_the_meta_parameters_finite_and_repeatable(name, make, fast, model):
    _, inner, meta, task = setting(model, make(), 2, fast)
    found = ESTIMATORS[name](inner)(meta, task)
    is_like(found.grads.weights, meta.weights)
    is_like(found.grads.rule, meta.rule)
    assert found.loss.shape == ()
    assert found.loss.dtype == torch.float64
    leaves = tree_leaves(found)
    assert all(torch.isfinite(leaf).all() for leaf in leaves)
    assert not any(leaf.requires_grad for leaf in leaves)
    again = tree_leaves(ESTIMATORS[name](inner)(meta, task))
    assert all(torch.equal(a, b) for a, b in zip(leaves, again, strict=True))


@every_rule
@every_estimator
def test_the_loss_is_that_of_the_query_set(name, make):
    _, inner, meta, task = setting("mlp_tanh", make(), 3)
    found = ESTIMATORS[name](inner)(meta, task).loss
    if name in DOES_NOT_ADAPT:
        right = inner.loss(inner.rule.view(meta.rule, meta.weights), everything(task))
    else:
        seen = everything(task) if name in SEES_THE_QUERY else task.support
        right = inner.loss(inner.adapt(meta, seen), task.query)
    torch.testing.assert_close(found, right, rtol=1e-12, atol=0)


@every_estimator
def test_following_the_gradients_reduces_the_loss(name):
    _, inner, meta, task = setting("mlp_tanh", EVERY["sgd"](lr=0.05), 2)
    losses = []
    for _ in range(20):
        loss, grads = ESTIMATORS[name](inner)(meta, task)
        meta = om.Meta({n: w - 0.1 * grads.weights[n] for n, w in meta.weights.items()}, meta.rule)
        losses.append(float(loss))
    assert losses[-1] < 0.95 * losses[0]


@every_estimator
def test_tasks_may_have_one_sample(name):
    given, inner, meta, _ = setting("mlp_tanh", EVERY["sgd"](), 2)
    found = ESTIMATORS[name](inner)(meta, given.task(0, 1, 1))
    assert all(torch.isfinite(leaf).all() for leaf in tree_leaves(found))
