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
    """Pairs of ``widths`` at which differences are taken, and the share of its norm that a derivative may be off."""

    widths: tuple[tuple[float, float], ...]
    tolerance: float


PRECISIONS = {
    torch.float64: Precision(((1e-6, 3e-7), (1e-7, 3e-8), (1e-8, 3e-9)), 1e-4),
    torch.float32: Precision(((2e-2, 1e-2), (2e-3, 1e-3)), 5e-2),
}
"""Differences of coarser numbers than these say nothing."""


def judge(
    value: Callable[[Params], Tensor], along: Callable[[Params], Tensor], at: Params, precision: Precision
) -> Verdict:
    """Return whether ``along(v)`` is d value(at + t v) / dt, v random, for a ``value`` of any shape.

    A direction counts against it when the differences at both widths agree with each other and not with ``along``:
    where a kink (of ReLU, of a maximum) lies between, or the numbers are too coarse, they do not. It is "wrong" when
    most directions count against it, "unclear" when none counts for it either. Unless it is "right" the next pair of
    widths is tried, for what is wrong is so at all widths, while many kinks together bend the differences alike at one.
    """
    verdict: Verdict = "unclear"
    for widths in precision.widths:
        found = _judge(value, along, at, widths, precision.tolerance)
        if found == "right":
            return found
        verdict = "wrong" if "wrong" in (found, verdict) else "unclear"
    return verdict


def _judge(
    value: Callable[[Params], Tensor],
    along: Callable[[Params], Tensor],
    at: Params,
    widths: tuple[float, float],
    tolerance: float,
) -> Verdict:
    found = [_compare(value, along, at, widths, seed) for seed in range(DIRECTIONS)]
    scale = median(max(one.derivative, one.difference) for one in found)
    here = value(at)
    rounding = max(1e3 * torch.finfo(here.dtype).eps * float(here.norm()) / min(widths), 1e-300)
    allowed = max(tolerance * scale, rounding)
    steady = [one for one in found if one.unsteady <= allowed]
    wrong = sum(one.error > allowed for one in steady)
    if wrong > DIRECTIONS // 2:
        return "wrong"
    return "right" if len(steady) - wrong >= max(wrong, 1) else "unclear"


def slope(gradient: Params) -> Callable[[Params], Tensor]:
    """Return v -> <gradient, v>."""
    return lambda v: torch.stack([(gradient[name] * v[name]).sum() for name in gradient]).sum()


class _Compared(NamedTuple):
    derivative: float
    difference: float
    error: float
    unsteady: float


def _compare(
    value: Callable[[Params], Tensor],
    along: Callable[[Params], Tensor],
    at: Params,
    widths: tuple[float, float],
    seed: int,
) -> _Compared:
    random = torch.Generator().manual_seed(seed)
    direction = {
        name: torch.randn(tensor.shape, generator=random, dtype=torch.float64).to(tensor) for name, tensor in at.items()
    }

    def difference(width: float) -> Tensor:
        ahead = value({name: tensor + width * direction[name] for name, tensor in at.items()})
        behind = value({name: tensor - width * direction[name] for name, tensor in at.items()})
        return (ahead - behind) / (2 * width)

    derivative = along(direction)
    wide, narrow = (difference(width) for width in widths)
    return _Compared(*(float(tensor.norm()) for tensor in (derivative, narrow, derivative - narrow, wide - narrow)))
