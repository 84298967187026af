"""Exact meta-gradients of any inner rule by brute force: one graph of the whole unrolled loop, no ``torch.func``."""

from collections.abc import Iterator
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.func import functional_call

from online_meta.types import Batch, Carry, InnerRule, Meta, MetaGrad, Params, Task
from tests.numerics.oracle import CRITERIA


class Loop:
    """A module, the name of its loss and a rule, run by plain autograd."""

    def __init__(self, module: nn.Module, loss: str, rule: InnerRule, steps: int, fast: tuple[str, ...]) -> None:
        self.module, self.criterion, self.rule, self.steps, self.fast = module, CRITERIA[loss], rule, steps, fast

    def gradient(self, meta: Meta, task: Task, *, constant_gradients: bool = False) -> MetaGrad:
        """Return the query loss and its gradient; ``constant_gradients`` detaches the inner ones (first order)."""
        leaves = Meta(
            *({name: value.detach().clone().requires_grad_() for name, value in part.items()} for part in meta)
        )
        *_, last = self._carries(leaves, task.support, constant_gradients)
        loss = self._loss(leaves, last.phi, task.query)
        given = [*leaves.weights.values(), *leaves.rule.values()]
        grads = iter(torch.autograd.grad(loss, given, materialize_grads=True))
        return MetaGrad(loss.detach(), Meta(*({name: next(grads) for name in part} for part in leaves)))

    def _carries(self, meta: Meta, support: Batch, constant_gradients: bool) -> Iterator[Carry]:
        phi = {name: w for name, w in meta.weights.items() if any(fnmatchcase(name, glob) for glob in self.fast)}
        carry = self.rule.start(meta.rule, phi)
        yield carry
        for k in range(self.steps):
            loss = self._loss(meta, carry.phi, support)
            grads = torch.autograd.grad(loss, list(carry.phi.values()), create_graph=True)
            kept = [grad.detach() if constant_gradients else grad for grad in grads]
            carry = self.rule.update(meta.rule, carry, dict(zip(carry.phi, kept, strict=True)), k)
            yield carry

    def _loss(self, meta: Meta, phi: Params, batch: Batch) -> Tensor:
        weights = self.rule.view(meta.rule, {**meta.weights, **phi})
        return self.criterion(functional_call(self.module, weights, (batch.x,)), batch.y)
