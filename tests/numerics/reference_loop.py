"""Compare meta-gradients with an inner loop written out from its paper and differentiated by plain autograd."""

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

ReferenceLoop = Callable[..., dict[str, torch.Tensor]]
"""(weights, names that adapt, rule's parameters, gradient of a dict of weights) -> the model's weights after the loop.

``gradient(phi, see)`` is grad L at phi on the support set; ``see`` maps phi to the weights that the model uses."""


def unroll(given, meta, task, fast, reference, *, constant_gradients=False):
    """Return the query loss and meta-gradient of a reference loop."""
    weights, rule = ({n: v.detach().clone().requires_grad_() for n, v in part.items()} for part in meta)
    adapts = [name for name in weights if any(fnmatchcase(name, glob) for glob in fast)]

    def loss_of(seen, batch):
        return CRITERIA[given.loss](functional_call(given.module, {**weights, **seen}, (batch.x,)), batch.y)

    def gradient(phi, see=lambda phi: phi):
        leaves = list(phi.values())
        grads = torch.autograd.grad(loss_of(see(phi), task.support), leaves, create_graph=True, allow_unused=True)
        grads = [torch.zeros_like(v) if g is None else g for v, g in zip(leaves, grads, strict=True)]
        return {n: g.detach() if constant_gradients else g for n, g in zip(phi, grads, strict=True)}

    loss = loss_of(reference(weights, adapts, rule, gradient), task.query)
    found = iter(torch.autograd.grad(loss, [*weights.values(), *rule.values()], materialize_grads=True))
    return om.MetaGrad(loss.detach(), om.Meta({n: next(found) for n in weights}, {n: next(found) for n in rule}))


def shifted(rule, seed=3):
    """Return a rule's parameters moved a little from their start, so that none is an identity or 0."""
    random = torch.Generator().manual_seed(seed)
    return {n: v + 0.03 * torch.randn(v.shape, generator=random, dtype=v.dtype) for n, v in rule.items()}


def join_parts(meta):
    """Return weights and rule parameters in one dict."""
    return {f"{part}/{name}": value for part, values in meta._asdict().items() for name, value in values.items()}


def check_against_reference(rule, reference, name, fast=("*",), steps=STEPS, slope=True):
    """Check that ``exact`` and ``first_order`` equal the reference loop, and ``exact`` central differences too."""
    given = problem(name)
    inner = om.Inner(om.model_loss(given.module, given.loss), rule, steps, fast)
    meta = inner.init(given.weights())
    meta = om.Meta(meta.weights, shifted(meta.rule))
    for seed in range(2):
        task = given.task(seed)
        exact, right = om.exact(inner)(meta, task), unroll(given, meta, task, fast, reference)
        torch.testing.assert_close(exact.loss, right.loss, rtol=1e-12, atol=0)
        assert_close(join_parts(exact.grads), join_parts(right.grads), 1e-10)
        first = om.first_order(inner)(meta, task)
        held = unroll(given, meta, task, fast, reference, constant_gradients=True)
        assert_close(join_parts(first.grads), join_parts(held.grads), 1e-10)
        assert relative_error(join_parts(first.grads), join_parts(exact.grads)) > 1e-4
        if slope:
            check_slope(inner, meta, task, exact)


def check_slope(inner, meta, task, found):
    """Check the gradient against the slope of the adapted loss, along a direction of weights and rule parameters."""

    def adapted_loss(values):
        parts = {"weights": {}, "rule": {}}
        for key, value in values.items():
            part, _, name = key.partition("/")
            parts[part][name] = value
        here = om.Meta(**parts)
        return inner.loss(inner.adapt(here, task.support), task.query)

    at = join_parts(meta)
    random = torch.Generator().manual_seed(5)
    along = {n: torch.randn(v.shape, generator=random, dtype=v.dtype) for n, v in at.items()}
    slope = central_difference(adapted_loss, at, along)
    assert float(flat(join_parts(found.grads)) @ flat(along)) == pytest.approx(slope, rel=1e-5, abs=1e-7)


def check_slope_of_bound(gradient, meta, task):
    """Check a gradient against the slope of the loss that comes with it, along a direction of all parameters."""
    found = join_parts(gradient(meta, task).grads)
    random = torch.Generator().manual_seed(5)
    along = {n: torch.randn(v.shape, generator=random, dtype=v.dtype) for n, v in found.items()}

    def bound(at):
        parts = ({n: at[f"{part}/{n}"] for n in values} for part, values in meta._asdict().items())
        return gradient(om.Meta(*parts), task).loss

    slope = central_difference(bound, join_parts(meta), along, 1e-6)
    assert sum(float((found[n] * along[n]).sum()) for n in along) == pytest.approx(slope, rel=1e-6)
