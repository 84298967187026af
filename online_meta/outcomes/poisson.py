"""Counts with a Poisson distribution."""

import torch
from torch import Tensor

from online_meta.outcomes import require_same_shape, require_tensor, spread_entries, sum_rows
from online_meta.types import Outcome, Tensors


def build() -> Outcome:
    """Return P(y) = e^(-rate) rate^y / y! with rate = exp(output), each entry; y is 0, 1, 2, ...

    Output and y have the same shape. ``cdf`` is the mid-distribution function P(Y < y) + P(Y = y) / 2. Its mean over y
    is 1/2, so that counts are neither always early nor always late in their distribution.
    """
    return Outcome(_nll, _mean, _cdf, variance=_mean, root=_root)


def _nll(output: Tensors, y: Tensors) -> Tensor:
    output, y = require_same_shape("poisson", output, y)
    return sum_rows(_entries(output, y.to(output.dtype)))


def _entries(log_rate: Tensor, y: Tensor) -> Tensor:
    return log_rate.exp() - y * log_rate + torch.lgamma(y + 1)


def _mean(output: Tensors) -> Tensor:
    return require_tensor("poisson", output).exp()


def _cdf(output: Tensors, y: Tensors) -> Tensor:
    output, y = require_same_shape("poisson", output, y)
    count = y.to(output.dtype)
    known = count.clamp_min(0)
    # P(Y <= y) is the regularised upper incomplete gamma function of y + 1 at the rate.
    middle: Tensor = torch.special.gammaincc(known + 1, output.exp()) - 0.5 * (-_entries(output, known)).exp()
    return middle.where(count >= 0, 0.0)


def _root(output: Tensors, y: Tensors) -> Tensor:
    return spread_entries((0.5 * require_tensor("poisson", output)).exp())


def example(n: int) -> tuple[Tensors, Tensors]:
    """Return n logarithms of rates, (n, 1), and counts."""
    random = torch.Generator().manual_seed(0)
    output = torch.randn(n, 1, generator=random, dtype=torch.float64)
    return output, torch.poisson(output.exp(), generator=random).long()
