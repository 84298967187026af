"""Are these the derivatives of that function? Asked by central differences, with patience for kinks."""

from collections.abc import Callable
from statistics import median
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from online_meta.types import Params

Verdict = Literal["right", "wrong", "unclear"]

DIRECTIONS = 3


class Precision(NamedTuple):
    """Pairs of ``step_sizes`` at which differences are taken, and the share of its norm that a derivative may be off."""

    step_sizes: tuple[tuple[float, float], ...]
    tolerance: float


PRECISIONS = {
    torch.float64: Precision(((1e-6, 3e-7), (1e-7, 3e-8), (1e-8, 3e-9)), 1e-4),
    torch.float32: Precision(((2e-2, 1e-2), (2e-3, 1e-3)), 5e-2),
}
"""Differences of coarser numbers than these say nothing."""


def check_derivative(
    value: Callable[[Params], Tensor], derivative_along: Callable[[Params], Tensor], at: Params, precision: Precision
) -> Verdict:
    """Return whether ``derivative_along(v)`` is d value(at + t v) / dt, v random, for a ``value`` of any shape.

    A direction counts against it when the differences at both widths agree with each other and not with ``derivative_along``:
    where a kink (of ReLU, of a maximum) lies between, or the numbers are too coarse, they do not. It is "wrong" when
    most directions count against it, "unclear" when none counts for it either. Unless it is "right" the next pair of
    widths is tried, for what is wrong is so at all widths, while many kinks together bend the differences alike at one.
    """
    verdict: Verdict = "unclear"
    for step_sizes in precision.step_sizes:
        found = _check_at_steps(value, derivative_along, at, step_sizes, precision.tolerance)
        if found == "right":
            return found
        verdict = "wrong" if "wrong" in (found, verdict) else "unclear"
    return verdict


def _check_at_steps(
    value: Callable[[Params], Tensor],
    derivative_along: Callable[[Params], Tensor],
    at: Params,
    step_sizes: tuple[float, float],
    tolerance: float,
) -> Verdict:
    found = [_compare(value, derivative_along, at, step_sizes, seed) for seed in range(DIRECTIONS)]
    scale = median(max(one.derivative, one.difference) for one in found)
    here = value(at)
    rounding = max(1e3 * torch.finfo(here.dtype).eps * float(here.norm()) / min(step_sizes), 1e-300)
    allowed = max(tolerance * scale, rounding)
    steady = [one for one in found if one.disagreement <= allowed]
    wrong = sum(one.error > allowed for one in steady)
    if wrong > DIRECTIONS // 2:
        return "wrong"
    return "right" if len(steady) - wrong >= max(wrong, 1) else "unclear"


def directional_derivative(gradient: Params) -> Callable[[Params], Tensor]:
    """Return v -> <gradient, v>."""
    return lambda v: torch.stack([(gradient[name] * v[name]).sum() for name in gradient]).sum()


class _Comparison(NamedTuple):
    derivative: float
    difference: float
    error: float
    disagreement: float


def _compare(
    value: Callable[[Params], Tensor],
    derivative_along: Callable[[Params], Tensor],
    at: Params,
    step_sizes: tuple[float, float],
    seed: int,
) -> _Comparison:
    random = torch.Generator().manual_seed(seed)
    direction = {
        name: torch.randn(tensor.shape, generator=random, dtype=torch.float64).to(tensor) for name, tensor in at.items()
    }

    def difference(width: float) -> Tensor:
        ahead = value({name: tensor + width * direction[name] for name, tensor in at.items()})
        behind = value({name: tensor - width * direction[name] for name, tensor in at.items()})
        return (ahead - behind) / (2 * width)

    derivative = derivative_along(direction)
    wide, narrow = (difference(width) for width in step_sizes)
    return _Comparison(*(float(tensor.norm()) for tensor in (derivative, narrow, derivative - narrow, wide - narrow)))
