"""Meta-gradients of an inner loop that a test writes by hand, from the paper: one graph, by plain autograd."""

from collections.abc import Callable
from fnmatch import fnmatchcase

import pytest
import torch
from torch.func import functional_call

import online_meta as om
from online_meta.testing.compare import assert_close, flat, relative_error
from online_meta.testing.oracle import CRITERIA, central_difference
from tests.numerics.problems import problem

STEPS = 4

ByHand = Callable[..., dict[str, torch.Tensor]]
"""(weights, names that adapt, rule's parameters, gradient of a dict of weights) -> the model's weights after the loop.

``gradient(phi, see)`` gives grad L by phi on the support set, ``see`` saying what the model is called with."""


def unroll(given, meta, task, fast, by_hand, *, constant_gradients=False):
    """Return the query loss and meta-gradient of a loop written by hand."""
    weights, rule = ({n: v.detach().clone().requires_grad_() for n, v in part.items()} for part in meta)
    adapts = [name for name in weights if any(fnmatchcase(name, glob) for glob in fast)]

    def loss_of(seen, batch):
        return CRITERIA[given.loss](functional_call(given.module, {**weights, **seen}, (batch.x,)), batch.y)

    def gradient(phi, see=lambda phi: phi):
        leaves = list(phi.values())
        grads = torch.autograd.grad(loss_of(see(phi), task.support), leaves, create_graph=True, allow_unused=True)
        grads = [torch.zeros_like(v) if g is None else g for v, g in zip(leaves, grads, strict=True)]
        return {n: g.detach() if constant_gradients else g for n, g in zip(phi, grads, strict=True)}

    loss = loss_of(by_hand(weights, adapts, rule, gradient), task.query)
    found = iter(torch.autograd.grad(loss, [*weights.values(), *rule.values()], materialize_grads=True))
    return om.MetaGrad(loss.detach(), om.Meta({n: next(found) for n in weights}, {n: next(found) for n in rule}))


def shifted(rule, seed=3):
    """Return a rule's parameters a little off their start, where nothing is an identity or 0 any more."""
    random = torch.Generator().manual_seed(seed)
    return {n: v + 0.03 * torch.randn(v.shape, generator=random, dtype=v.dtype) for n, v in rule.items()}


def both(meta):
    """Return weights and rule in one dict."""
    return {f"{part}/{name}": value for part, values in meta._asdict().items() for name, value in values.items()}


def assert_is_by_hand(rule, by_hand, name, fast=("*",), steps=STEPS, slope=True):
    """Assert that ``exact`` and ``first_order`` are what the loop by hand gives, and ``exact`` the loss's slope."""
    given = problem(name)
    inner = om.Inner(om.model_loss(given.module, given.loss), rule, steps, fast)
    meta = inner.init(given.weights())
    meta = om.Meta(meta.weights, shifted(meta.rule))
    for seed in range(2):
        task = given.task(seed)
        exact, right = om.exact(inner)(meta, task), unroll(given, meta, task, fast, by_hand)
        torch.testing.assert_close(exact.loss, right.loss, rtol=1e-12, atol=0)
        assert_close(both(exact.grads), both(right.grads), 1e-10)
        first = om.first_order(inner)(meta, task)
        held = unroll(given, meta, task, fast, by_hand, constant_gradients=True)
        assert_close(both(first.grads), both(held.grads), 1e-10)
        assert relative_error(both(first.grads), both(exact.grads)) > 1e-4
        if slope:
            assert_is_slope(inner, meta, task, exact)


def assert_is_slope(inner, meta, task, found):
    """Assert that the gradient is the slope of the adapted loss, along a direction of weights and rule together."""

    def adapted_loss(values):
        parts = {"weights": {}, "rule": {}}
        for key, value in values.items():
            part, _, name = key.partition("/")
            parts[part][name] = value
        here = om.Meta(**parts)
        return inner.loss(inner.adapt(here, task.support), task.query)

    at = both(meta)
    random = torch.Generator().manual_seed(5)
    along = {n: torch.randn(v.shape, generator=random, dtype=v.dtype) for n, v in at.items()}
    slope = central_difference(adapted_loss, at, along)
    assert float(flat(both(found.grads)) @ flat(along)) == pytest.approx(slope, rel=1e-5, abs=1e-7)
