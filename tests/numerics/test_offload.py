"""Offloading the inner trajectory to host memory gives the same bits."""

import pytest
import torch
from torch.utils._pytree import tree_leaves, tree_map

import online_meta as om
from online_meta.metagrads import _adjoint
from online_meta.metagrads._adjoint import offload_to_host
from tests.numerics.problems import problem


def same(found, right):
    return all(torch.equal(a, b) for a, b in zip(tree_leaves(found), tree_leaves(right), strict=True))


@pytest.mark.parametrize("rematerialise", [False, True])
@pytest.mark.parametrize("steps", [0, 1, 2, 7, 9])
def test_every_point_except_the_last_is_offloaded_once_and_restored(monkeypatch, steps, rematerialise):
    """Copies stand in for another device: a restored tensor is a new tensor with the same bits."""
    given = problem("mlp_tanh")
    inner = om.Inner(om.model_loss(given.module, given.loss), om.rules.momentum(lr=0.05), steps)
    meta, task = inner.init(given.weights()), given.task(1)
    right = om.exact(inner, rematerialise=rematerialise)(meta, task)
    offloaded, restored = [], []

    def copied(tree):
        offloaded.append(tree)
        copy = tree_map(torch.clone, tree)
        return lambda: (restored.append(tree), copy)[1]

    monkeypatch.setattr(_adjoint, "offload_to_host", copied)
    assert same(om.exact(inner, rematerialise=rematerialise, offload=True)(meta, task), right)
    assert len(restored) >= steps
    if not rematerialise:
        assert len(offloaded) == steps


def test_tensors_on_a_cpu_are_not_copied():
    tree = {"phi": torch.ones(2)}
    assert offload_to_host(tree)()["phi"] is tree["phi"]
