"""A normal distribution whose standard deviation is known: the squared error in nats."""

import math
from functools import cache
from typing import Annotated

import torch
from annotated_types import Gt
from torch import Tensor

from online_meta.outcomes import require_same_shape, require_tensor, spread_entries
from online_meta.outcomes._normal import normal_cdf, normal_nll
from online_meta.types import Outcome, Tensors

NAME = "gaussian_of_noise"


@cache  # Outcomes are one family if their functions are the same.
def build(*, sigma: Annotated[float, Gt(0)] = 1.0) -> Outcome:
    """Return y ~ N(output, sigma^2), each entry; the output has the shape of y.

    A step along the gradient of this loss is 1 / (2 sigma^2) times that of the squared error for one entry a row: an
    inner learning rate that suits ``mse`` is to be multiplied by 2 sigma^2.

    Args:
        sigma: the standard deviation of the noise, in units of y.

    Returns:
        The outcome.

    Raises:
        ValueError: if ``sigma`` is not positive and finite.
    """
    if not 0 < sigma < math.inf:
        raise ValueError(f"sigma is {sigma}: a standard deviation is positive and finite")

    def standardise(output: Tensors, y: Tensors) -> Tensor:
        output, y = require_same_shape(NAME, output, y)
        return (y.to(output.dtype) - output) / sigma

    def nll(output: Tensors, y: Tensors) -> Tensor:
        return normal_nll(standardise(output, y), math.log(sigma))

    def cdf(output: Tensors, y: Tensors) -> Tensor:
        return normal_cdf(standardise(output, y))

    def variance(output: Tensors) -> Tensor:
        return torch.full_like(require_tensor(NAME, output), sigma**2)

    def root(output: Tensors, y: Tensors) -> Tensor:
        return spread_entries(torch.full_like(require_tensor(NAME, output), 1 / sigma))

    return Outcome(nll, lambda output: require_tensor(NAME, output), cdf, variance=variance, root=root)


def example(n: int) -> tuple[Tensors, Tensors]:
    """Return n means and targets, (n, 1)."""
    random = torch.Generator().manual_seed(0)
    output, y = torch.randn(2, n, 1, generator=random, dtype=torch.float64)
    return output, y
