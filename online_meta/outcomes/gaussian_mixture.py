"""A mixture of normal distributions for each target: an answer that leaves several values open."""

import math
from functools import cache
from typing import Annotated

import torch
from annotated_types import Gt
from torch import Tensor

from online_meta.outcomes import describe_shape, misfit, sum_rows
from online_meta.outcomes._normal import normal_cdf, scale_to_std
from online_meta.types import Outcome, Tensors

PARTS = ("mean", "scale", "logit")
NEEDS = (
    "'mean', 'scale' and 'logit', each (n, ..., K) for K normal distributions and y (n, ...), or one tensor "
    "(n, ..., 3 K), whose last dimension has the means, then the scales, then the logits"
)


@cache  # Outcomes are one family if their functions are the same.
def build(*, least: Annotated[float, Gt(0)] = 1e-3) -> Outcome:
    """Return y ~ sum_k w_k N(mean_k, std_k^2), each entry: a mixture density network (Bishop, 1994, NCRG/94/004).

    The weights w are softmax(logit), and std = least + softplus(scale), softplus(a) = log(1 + e^a). The output is a
    dict of ``mean``, ``scale`` and ``logit``, each (n, ..., K) for targets (n, ...), or one tensor (n, ..., 3 K): first
    the means, then the scales, then the logits. So a perceptron with 3 K outputs is a mixture for targets (n,).

    Args:
        least: the lower bound of the standard deviations, in units of y.

    Returns:
        The outcome.

    Raises:
        ValueError: if ``least`` is not positive and finite.
    """
    if not 0 < least < math.inf:
        raise ValueError(f"least is {least}: the least standard deviation is positive and finite")

    def standardise(output: Tensors, y: Tensors) -> tuple[Tensor, Tensor, Tensor]:
        mean, scale, logit = _split(output)
        if not isinstance(y, Tensor) or mean.shape[:-1] != y.shape:
            raise misfit("gaussian_mixture", output, y, NEEDS)
        std = scale_to_std(scale, least)
        return (y.to(mean.dtype)[..., None] - mean) / std, std, logit

    def nll(output: Tensors, y: Tensors) -> Tensor:
        z, std, logit = standardise(output, y)
        each = torch.log_softmax(logit, -1) - 0.5 * z**2 - std.log() - 0.5 * math.log(2 * math.pi)
        return sum_rows(-torch.logsumexp(each, -1))

    def cdf(output: Tensors, y: Tensors) -> Tensor:
        z, _, logit = standardise(output, y)
        return (torch.softmax(logit, -1) * normal_cdf(z)).sum(-1).clamp(max=1.0)

    def variance(output: Tensors) -> Tensor:
        mean, scale, logit = _split(output)
        squares = scale_to_std(scale, least) ** 2 + (mean - _mean(output)[..., None]) ** 2
        return (torch.softmax(logit, -1) * squares).sum(-1)

    return Outcome(nll, _mean, cdf, variance=variance)


def _mean(output: Tensors) -> Tensor:
    mean, _, logit = _split(output)
    return (torch.softmax(logit, -1) * mean).sum(-1)


def _split(output: Tensors) -> tuple[Tensor, Tensor, Tensor]:
    """Return mean, raw scale and logit; raise ``ValueError`` for an output that has none."""
    if isinstance(output, Tensor) and output.ndim >= 2 and output.shape[-1] % 3 == 0:
        mean, scale, logit = output.chunk(3, -1)
        return mean, scale, logit
    if isinstance(output, dict) and {*output} == {*PARTS}:
        mean, scale, logit = (output[name] for name in PARTS)
        if mean.ndim >= 2 and mean.shape == scale.shape == logit.shape:
            return mean, scale, logit
    raise ValueError(f"gaussian_mixture: the output has shape {describe_shape(output)}: it needs {NEEDS}")


def example(n: int) -> tuple[Tensors, Tensors]:
    """Return mixtures of 4 normal distributions, (n, 1, 4), and targets (n, 1)."""
    random = torch.Generator().manual_seed(0)
    output = {name: torch.randn(n, 1, 4, generator=random, dtype=torch.float64) for name in PARTS}
    output["scale"] = output["scale"].abs()  # Wide enough to integrate on a grid.
    return output, torch.randn(n, 1, generator=random, dtype=torch.float64)
