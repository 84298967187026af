"""The inner trajectory laid aside in the memory of the host: the same bits, and less on the device."""

import pytest
import torch
from torch.utils._pytree import tree_leaves, tree_map

import online_meta as om
from online_meta import adjoint
from online_meta.offload import laid_aside
from tests.numerics.problems import problem

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def same(found, right):
    return all(torch.equal(a, b) for a, b in zip(tree_leaves(found), tree_leaves(right), strict=True))


@pytest.mark.parametrize("rematerialise", [False, True])
@pytest.mark.parametrize("steps", [0, 1, 2, 7, 9])
def test_every_point_but_the_last_is_laid_aside_once_and_comes_back(monkeypatch, steps, rematerialise):
    """Copies stand in for another device: what comes back is another tensor of the same bits."""
    given = problem("mlp_tanh")
    inner = om.Inner(om.model_loss(given.module, given.loss), om.rules.momentum(lr=0.05), steps)
    meta, task = inner.init(given.weights()), given.task(1)
    right = om.exact(inner, rematerialise=rematerialise)(meta, task)
    laid, back = [], []

    def copied(tree):
        laid.append(tree)
        copy = tree_map(torch.clone, tree)
        return lambda: (back.append(tree), copy)[1]

    monkeypatch.setattr(adjoint, "laid_aside", copied)
    assert same(om.exact(inner, rematerialise=rematerialise, offload=True)(meta, task), right)
    assert len(back) >= steps
    if not rematerialise:
        assert len(laid) == steps


def test_tensors_on_a_cpu_stay_what_they_are():
    tree = {"phi": torch.ones(2)}
    assert laid_aside(tree)()["phi"] is tree["phi"]


@gpu
@pytest.mark.parametrize("options", [{}, {"rematerialise": True}])
def test_a_gpu_gives_the_same_bits_and_holds_less(options):
    given = problem("mlp_tanh")
    module = torch.nn.Sequential(*(torch.nn.Linear(4, 2048), torch.nn.Tanh(), torch.nn.Linear(2048, 2))).double().cuda()
    inner = om.Inner(om.model_loss(module, "mse"), om.rules.sgd(lr=0.01), 16)
    meta = inner.init(dict(module.named_parameters()))
    task = tree_map(torch.Tensor.cuda, given.task())
    peaks, found = [], []
    for offload in (False, True):
        gradient = om.exact(inner, offload=offload, **options)
        gradient(meta, task)
        torch.cuda.reset_peak_memory_stats()
        found.append(gradient(meta, task))
        peaks.append(torch.cuda.max_memory_allocated())
    assert same(*found)
    assert peaks[1] < peaks[0]
