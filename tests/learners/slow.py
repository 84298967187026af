"""Reference online learners from plain autograd, ``torch.optim`` and explicit samples, without the package."""

from collections.abc import Sequence

import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from online_meta.types import Batch, Params, Task

Samples = Sequence[tuple[int, float, float]]
"""Rounds, their weights, and their shares of the divisor."""


def joined(task: Task) -> Batch:
    return Batch(*(torch.cat(pair) for pair in zip(task.support, task.query, strict=True)))


def loss_of(module: nn.Module, weights: Params, batch: Batch) -> torch.Tensor:
    return F.mse_loss(functional_call(module, weights, (batch.x,)), batch.y)


def adapt(module: nn.Module, weights: Params, support: Batch, lr: float, steps: int) -> Params:
    """Return the weights after ``steps`` steps of gradient descent, with their graph."""
    for _ in range(steps):
        grads = torch.autograd.grad(loss_of(module, weights, support), list(weights.values()), create_graph=True)
        weights = {name: w - lr * g for (name, w), g in zip(weights.items(), grads, strict=True)}
    return weights


def follow(
    module: nn.Module, optimizer: torch.optim.Optimizer, tasks: Sequence[Task], samples: Samples, lr: float, steps: int
) -> None:
    """Make one step of ``optimizer`` on sum(weight f_k(U_k(w))) / sum(share) over the samples."""
    optimizer.zero_grad()
    weights = dict(module.named_parameters())
    total = sum(share for *_, share in samples)
    for round, weight, _ in samples:
        adapted = adapt(module, weights, tasks[round].support, lr, steps)
        (loss_of(module, adapted, tasks[round].query) * weight / total).backward()
    optimizer.step()


def train(module: nn.Module, batch: Batch, steps: int, lr: float) -> None:
    """Train ``module`` on one batch with Adam."""
    optimizer = torch.optim.Adam(module.parameters(), lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        F.mse_loss(module(batch.x), batch.y).backward()
        optimizer.step()
