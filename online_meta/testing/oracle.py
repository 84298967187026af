"""Meta-gradients by brute force: the inner loop unrolled in plain autograd, written apart from the package.

It shares no code with what it judges: the user's own module, ``torch.autograd.grad`` and one long graph. (Models
that draw random numbers are seeded as the package says: inner step k as k + 1 of the support set, the query loss as 0.)
"""

import copy
from collections.abc import Callable
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from online_meta.functional.randomness import seeded
from online_meta.types import Batch, Meta, MetaGrad, Params, Task

CRITERIA = {"mse": F.mse_loss, "cross_entropy": F.cross_entropy}


def unrolled_maml(
    module: nn.Module,
    loss: str,
    weights: Params,
    task: Task,
    *,
    lr: float,
    steps: int,
    fast: tuple[str, ...] = ("*",),
    constant_gradients: bool = False,
) -> MetaGrad:
    """Return MAML's query loss and meta-gradient; ``constant_gradients`` detaches the inner ones (first order)."""
    leaves = {name: weight.detach().clone().requires_grad_() for name, weight in weights.items()}
    phi: Params = {name: leaf for name, leaf in leaves.items() if any(fnmatchcase(name, glob) for glob in fast)}
    for k in range(steps):
        support_loss = _loss(module, loss, {**leaves, **phi}, task.support, k + 1)
        inner = torch.autograd.grad(support_loss, list(phi.values()), create_graph=not constant_gradients)
        phi = {name: value - lr * grad for (name, value), grad in zip(phi.items(), inner, strict=True)}
    query_loss = _loss(module, loss, {**leaves, **phi}, task.query, 0)
    grads = torch.autograd.grad(query_loss, list(leaves.values()))
    return MetaGrad(query_loss.detach(), Meta(dict(zip(leaves, grads, strict=True)), {}))


def unrolled_reptile(module: nn.Module, loss: str, task: Task, *, lr: float, steps: int) -> Params:
    """Return w - phi_K, phi_K made by ``torch.optim.SGD`` on a copy of the module and all of the task's samples."""
    trained = copy.deepcopy(module)
    optimizer = torch.optim.SGD(trained.parameters(), lr=lr)
    x, y = torch.cat([task.support.x, task.query.x]), torch.cat([task.support.y, task.query.y])
    for _ in range(steps):
        optimizer.zero_grad()
        CRITERIA[loss](trained(x), y).backward()
        optimizer.step()
    after = dict(trained.named_parameters())
    return {name: (before - after[name]).detach() for name, before in module.named_parameters()}


def central_difference(objective: Callable[[Params], Tensor], at: Params, along: Params, width: float = 1e-7) -> float:
    """Return the slope of ``objective`` at a point along a direction; narrow, so as not to step over a kink."""
    ahead = objective({name: value + width * along[name] for name, value in at.items()})
    behind = objective({name: value - width * along[name] for name, value in at.items()})
    return float((ahead - behind).detach()) / (2 * width)


def _loss(module: nn.Module, loss: str, params: Params, batch: Batch, draw: int) -> Tensor:
    with seeded(batch, draw), sdpa_kernel(SDPBackend.MATH):
        return CRITERIA[loss](functional_call(module, params, (batch.x,)), batch.y)
