"""The squared error: a loss without a scale, so no likelihood; ``gaussian_of_noise`` has one."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from online_meta.outcomes import average_outputs, require_same_shape, require_tensor, spread_entries, sum_rows
from online_meta.types import Outcome, Tensors


def build() -> Outcome:
    """Return the mean squared error, ``F.mse_loss``; the output has the shape of y, and is the mean.

    ``nll`` is the mean of each row's squared errors, in units of y^2. Several outputs are averaged.
    """
    loss: Any = F.mse_loss  # which takes tensors only
    return Outcome(_nll, _mean, loss=loss, pool=average_outputs, root=_root)


def _mean(output: Tensors) -> Tensor:
    return require_tensor("mse", output)


def _nll(output: Tensors, y: Tensors) -> Tensor:
    output, y = require_same_shape("mse", output, y)
    return sum_rows((output - y) ** 2) / (output.numel() // max(len(output), 1) or 1)


def _root(output: Tensors, y: Tensors) -> Tensor:
    output, y = require_same_shape("mse", output, y)
    return spread_entries(torch.full_like(output, math.sqrt(2 * len(output) / max(output.numel(), 1))))


def example(n: int) -> tuple[Tensors, Tensors]:
    """Return n outputs and targets, (n, 2)."""
    random = torch.Generator().manual_seed(0)
    output, y = torch.randn(2, n, 2, generator=random, dtype=torch.float64)
    return output, y
