"""What every meta-gradient estimator of ``online_meta.metagrads`` keeps."""

from contextlib import suppress
from dataclasses import replace

import pytest
import torch
from torch.func import vmap
from torch.utils._pytree import tree_leaves, tree_map

import online_meta as om
import online_meta.metagrads
from online_meta import registry
from online_meta.answers import predict
from online_meta.functional.randomness import INIT_STEP
from online_meta.inner import drawing, effective_params, run_inner_loop
from online_meta.prediction import loss_of
from online_meta.testing.test_rules import EVERY, RANDOM, SEVERAL, every_fast, is_like, setting

ESTIMATORS = {name: registry.load(online_meta.metagrads, name) for name in registry.names(online_meta.metagrads)}
SEES_THE_QUERY = {"reptile"}
DOES_NOT_ADAPT = {"supervised"}
BOUNDS = {"chaser", "hierarchical_variational", "laplace", "variational"}
"""Differentiate something else than the query loss, or add to it; their own tests say what."""

CHOOSY = {"hierarchical_variational", "implicit", "laplace", "variational"}
"""Refuse some rules when they are made: those that do not pull back to their start, that adapt several models, that
draw nothing in training, or whose phi is no distribution."""


def takes(name, make):
    """Return whether an estimator takes a rule."""
    inner = setting("mlp_tanh", make(), 2)[1]
    if name not in CHOOSY:
        return bool(ESTIMATORS[name](inner))
    with suppress(ValueError):
        return bool(ESTIMATORS[name](inner))
    return False


PAIRS = {f"{name}-{rule}": (name, EVERY[rule]) for name in ESTIMATORS for rule in EVERY if takes(name, EVERY[rule])}
"""Each estimator with each rule that it takes."""

VECTORISED = {key: (name, make) for key, (name, make) in PAIRS.items() if make not in {EVERY[rule] for rule in RANDOM}}

every_pair = pytest.mark.parametrize(("name", "make"), PAIRS.values(), ids=PAIRS.keys())
every_estimator = pytest.mark.parametrize("name", ESTIMATORS)


def plainest(name):
    """Return gradient descent, or what is nearest to it of what an estimator takes."""
    return next(
        EVERY[rule] for rule in ("sgd", "proximal", "platipus", "bayes_by_gradient") if f"{name}-{rule}" in PAIRS
    )


def everything(task):
    return om.Batch(*(torch.cat(pair) for pair in zip(task.support, task.query, strict=True)))


@pytest.mark.parametrize("model", ["mlp_tanh", "conv_group_norm"])
@every_fast
@every_pair
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


@pytest.mark.parametrize(
    ("name", "make"),
    [pair for pair in PAIRS.values() if pair[0] not in BOUNDS],
    ids=[key for key, pair in PAIRS.items() if pair[0] not in BOUNDS],
)
def test_the_loss_is_that_of_the_query_set(name, make):
    _, inner, meta, task = setting("mlp_tanh", make(), 3)
    found = ESTIMATORS[name](inner)(meta, task).loss
    if name in DOES_NOT_ADAPT:
        right = inner.loss(inner.rule.view(meta.rule, meta.weights), everything(task))
    else:
        seen = everything(task) if name in SEES_THE_QUERY else task.support
        phi = run_inner_loop(inner, meta, seen).phi
        with drawing(inner, task.query, INIT_STEP, "query"):
            right = inner.loss(effective_params(inner, meta, phi), task.query)
        if make in SEVERAL:
            (belief,) = replace(inner, posterior=om.posteriors.particles(), samples=3).believe(meta, seen)
            right = loss_of(predict(inner.loss, belief, task.query.x), task.query.y)
    torch.testing.assert_close(found, right, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("name", "make"), VECTORISED.values(), ids=VECTORISED.keys())
def test_tasks_can_be_vectorised(name, make):
    given, inner, meta, _ = setting("mlp_tanh", make(), 2, ("head.*",))
    tasks = [given.task(seed) for seed in range(2)]
    gradient = ESTIMATORS[name](inner)
    together = vmap(lambda task: gradient(meta, task))(tree_map(lambda *leaves: torch.stack(leaves), *tasks))
    one_by_one = tree_map(lambda *leaves: torch.stack(leaves), *[gradient(meta, task) for task in tasks])
    for found, right in zip(tree_leaves(together), tree_leaves(one_by_one), strict=True):
        torch.testing.assert_close(found, right, rtol=1e-9, atol=1e-12)


@every_estimator
def test_following_the_gradients_reduces_the_loss(name):
    _, inner, meta, task = setting("mlp_tanh", plainest(name)(lr=0.05), 2)
    losses = []
    for _ in range(20):
        loss, grads = ESTIMATORS[name](inner)(meta, task)
        meta = om.Meta({n: w - 0.1 * grads.weights[n] for n, w in meta.weights.items()}, meta.rule)
        losses.append(float(loss))
    assert losses[-1] < 0.95 * losses[0]


@every_estimator
def test_tasks_may_have_one_sample(name):
    given, inner, meta, _ = setting("mlp_tanh", plainest(name)(), 2)
    found = ESTIMATORS[name](inner)(meta, given.task(0, 1, 1))
    assert all(torch.isfinite(leaf).all() for leaf in tree_leaves(found))


@every_estimator
def test_inference_mode_changes_nothing(name):
    _, inner, meta, task = setting("mlp_tanh", plainest(name)(), 2)
    right = ESTIMATORS[name](inner)(meta, task)
    with torch.inference_mode():
        found = ESTIMATORS[name](inner)(*tree_map(torch.clone, (meta, task)))
    assert all(torch.equal(a, b) for a, b in zip(tree_leaves(found), tree_leaves(right), strict=True))
    assert not any(leaf.is_inference() for leaf in tree_leaves(found))
