"""The meta-gradient by one long graph: slow and hungry, and written apart from what it is compared with."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from online_meta.inner import Inner, fast_weights
from online_meta.randomness import INIT_STEP, seeded
from online_meta.types import Batch, Carry, Meta, MetaGrad, Params, Task


def unrolled(inner: Inner, meta: Meta, task: Task) -> MetaGrad:
    """Return the query loss and d f(phi_K) / d meta by plain autograd through all ``inner.steps`` at once.

    The equations are those of ``Inner``; nothing of the adjoint recursion is used. The memory grows with the steps.
    A parameter that the loss does not depend on gets zeros.
    """
    with torch.enable_grad():
        leaves = Meta(*({name: value.detach().requires_grad_() for name, value in part.items()} for part in meta))
        loss = _loss(inner, leaves, _adapted(inner, leaves, task.support), task.query, INIT_STEP)
        tensors = [*leaves.weights.values(), *leaves.rule.values()]
        if not loss.requires_grad:
            grads = iter([torch.zeros_like(tensor) for tensor in tensors])
        else:
            grads = iter(torch.autograd.grad(loss, tensors, allow_unused=True, materialize_grads=True))
    return MetaGrad(loss.detach(), Meta(*({name: next(grads) for name in part} for part in leaves)))


def _adapted(inner: Inner, meta: Meta, support: Batch) -> Params:
    """Return phi_K, with the graph of how it came to be."""
    with _seeded_if_random(inner, support, INIT_STEP):
        carry: Carry = inner.rule.start(meta.rule, fast_weights(inner, meta.weights))
    for k in range(inner.steps):
        # What a rule begins with of its own accord, such as CAVIA's zeros, is a leaf: the loop differentiates by it.
        named = {n: value if value.requires_grad else value.detach().requires_grad_() for n, value in carry.phi.items()}
        carry = Carry(named, carry.state)
        loss = _loss(inner, meta, named, support, k + 1)
        phi = [*named.values()]
        if phi and loss.requires_grad:
            grads = torch.autograd.grad(loss, phi, create_graph=True, allow_unused=True, materialize_grads=True)
        else:
            grads = tuple(torch.zeros_like(value) for value in phi)
        with _seeded_if_random(inner, support, k + 1):
            carry = inner.rule.update(meta.rule, carry, dict(zip(named, grads, strict=True)), k)
    return carry.phi


def _loss(inner: Inner, meta: Meta, phi: Params, batch: Batch, step: int) -> Tensor:
    with _seeded_if_random(inner, batch, step):
        return inner.loss(inner.rule.view(meta.rule, {**meta.weights, **phi}), batch)


def _seeded_if_random(inner: Inner, batch: Batch, step: int) -> AbstractContextManager[None]:
    random = inner.rule.random or getattr(inner.loss, "random", False)
    return seeded(batch, step) if random else nullcontext()
