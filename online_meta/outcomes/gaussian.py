"""A normal distribution whose mean and standard deviation the model gives."""

import math
from functools import cache
from typing import Annotated

import torch
from annotated_types import Gt
from torch import Tensor

from online_meta.outcomes import describe_shape, misfit, spread_entries
from online_meta.outcomes._normal import normal_cdf, normal_nll, scale_to_std
from online_meta.types import Outcome, Tensors

NEEDS = (
    "'mean' and 'scale' of the shape of y, or one tensor (n, ..., 2 d) for y (n, ..., d), whose last dimension has the "
    "means and then the scales"
)


@cache  # Outcomes are one family if their functions are the same.
def build(*, least: Annotated[float, Gt(0)] = 1e-3) -> Outcome:
    """Return y ~ N(mean, std^2), each entry, with std = least + softplus(scale), softplus(a) = log(1 + e^a).

    The output is a dict of ``mean`` and ``scale``, both of the shape of y, or one tensor whose last dimension is twice
    that of y: first the means, then the scales.

    Args:
        least: the lower bound of the standard deviation, in units of y.

    Returns:
        The outcome.

    Raises:
        ValueError: if ``least`` is not positive and finite.
    """
    if not 0 < least < math.inf:
        raise ValueError(f"least is {least}: the least standard deviation is positive and finite")

    def standardise(output: Tensors, y: Tensors) -> tuple[Tensor, Tensor]:
        mean, scale = _split(output, y)
        if not isinstance(y, Tensor) or mean.shape != y.shape:
            raise misfit("gaussian", output, y, NEEDS)
        std = scale_to_std(scale, least)
        return (y.to(mean.dtype) - mean) / std, std

    def nll(output: Tensors, y: Tensors) -> Tensor:
        z, std = standardise(output, y)
        return normal_nll(z, std.log())

    def cdf(output: Tensors, y: Tensors) -> Tensor:
        return normal_cdf(standardise(output, y)[0])

    def variance(output: Tensors) -> Tensor:
        return scale_to_std(_split(output)[1], least) ** 2

    def root(output: Tensors, y: Tensors) -> Tensors:
        """Return 1 / std of the mean, and sqrt(2) (d std / d scale) / std of the scale."""
        _, std = standardise(output, y)
        of_mean, of_scale = 1 / std, math.sqrt(2) * torch.sigmoid(_split(output)[1]) / std
        if isinstance(output, Tensor):
            return spread_entries(torch.cat([of_mean, of_scale], -1))
        joined = spread_entries(torch.stack([of_mean, of_scale], 1))
        return dict(zip(("mean", "scale"), joined.unbind(1), strict=True))

    return Outcome(nll, lambda output: _split(output)[0], cdf, variance=variance, root=root)


def _split(output: Tensors, y: Tensors | None = None) -> tuple[Tensor, Tensor]:
    """Return mean and raw scale; raise ``ValueError`` for an output that has none."""
    if isinstance(output, Tensor) and output.ndim >= 2 and output.shape[-1] % 2 == 0:
        mean, scale = output.chunk(2, -1)
        return mean, scale
    if isinstance(output, dict) and {*output} == {"mean", "scale"} and output["mean"].shape == output["scale"].shape:
        return output["mean"], output["scale"]
    if y is None:
        raise ValueError(f"gaussian: the output has shape {describe_shape(output)}: it needs {NEEDS}")
    raise misfit("gaussian", output, y, NEEDS)


def example(n: int) -> tuple[Tensors, Tensors]:
    """Return n means with scales, (n, 2), and targets (n, 1)."""
    random = torch.Generator().manual_seed(0)
    output = torch.randn(n, 2, generator=random, dtype=torch.float64)
    return output, torch.randn(n, 1, generator=random, dtype=torch.float64)
