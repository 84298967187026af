"""Aggregation of experts, one algorithm per file: how much weight each of N experts has in a round.

A file NAME.py defines ``build(**options) -> Aggregation``; the registry finds it by its file name. Files whose names
begin with _ are not entries.

- All options are keyword-only. ``build`` raises ``ValueError`` for an option out of range.
- A state is a flat dict of CPU tensors, float64 or int64. All functions are pure: none writes to its arguments. A state
  that was stored and restored continues to the bit. A permutation of the experts permutes the weights, to the bit.
- ``init(count)`` returns the state before the first round; it raises ``ValueError`` if ``count`` is below 1.
- ``weights(state)`` has shape (N,), float64. The weights are at least 0, sum to 1, and depend on earlier losses only.
- ``update(state, losses, loss)`` returns the state after a round: ``losses`` (N,) are those of the experts, and
  ``loss`` is that of their aggregate under the round's weights. Without ``loss``, it is what the file's theorem
  charges: a number that is at least the aggregate's loss, or its expectation. Wrong shapes and numbers raise
  ``ValueError``.
- ``regret(state)`` is the sum of the aggregate's losses minus the best sum that the file compares with, the least sum
  of one expert unless the file says otherwise. 0 before the first round.
- ``bound(state)`` is what the file's theorem promises at this point: ``regret(state) <= bound(state)`` for all losses
  that ``update`` accepts, up to rounding, if no ``loss`` is above what the theorem charges.

Sums over experts are rounded once (``math.fsum``), so that they do not depend on the order of the experts.
"""

import math
import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from online_meta.regret.ledger import LARGEST_LOSS, is_finite_loss

FUNCTION = "build"


def log_sum_exp(values: Sequence[float]) -> float:
    """Return log sum_i exp(v_i); -inf if each value is -inf."""
    largest = max(values)
    if largest == -math.inf:
        return largest
    return largest + math.log(math.fsum(math.exp(value - largest) for value in values))


def exponential_weights(regrets: Sequence[float], rate: float = 1.0, prior: Sequence[float] | None = None) -> Tensor:
    """Return weights proportional to prior_i exp(rate regret_i), (N,) in float64; a uniform prior if it is None.

    The weight of an expert with a finite regret is at least the smallest normal number, 2e-308: the aggregate can
    return to an expert, however far behind.
    """
    largest = max(regrets)
    scores = [rate * (regret - largest) for regret in regrets]
    return weights_of(scores if prior is None else [s + math.log(p) for s, p in zip(scores, prior, strict=True)])


def weights_of(log_weights: Sequence[float]) -> Tensor:
    """Return exp(v_i) / sum_j exp(v_j), (N,) in float64, at least 2e-308 for each v_i above -inf."""
    total = log_sum_exp(log_weights)
    floors = (sys.float_info.min if value > -math.inf else 0.0 for value in log_weights)
    return numbers([max(math.exp(v - total), floor) for v, floor in zip(log_weights, floors, strict=True)])


def numbers(values: object) -> Tensor:
    """Return a number, or nested lists of them, as a float64 tensor."""
    return torch.tensor(values, dtype=torch.float64)


def start_regrets(count: int) -> Tensor:
    """Return the regret of N = ``count`` experts before the first round, (N,); raise ``ValueError`` below 1."""
    if count < 1:
        raise ValueError(f"count is {count}: an aggregation needs at least 1 expert")
    return numbers([0.0] * count)


def read_losses(losses: Tensor, count: int, loss: float | None, *, infinite: bool = False) -> list[float]:
    """Return the losses (N,) as Python numbers.

    Args:
        losses: those of the experts.
        count: N.
        loss: that of the aggregate, or None.
        infinite: whether an expert's loss may be +inf.

    Returns:
        The losses.

    Raises:
        ValueError: if the shape is not (N,), or if a number is not finite or above ``LARGEST_LOSS`` in size.
    """
    if losses.shape != (count,):
        raise ValueError(
            f"losses have shape {tuple(losses.shape)}: there are {count} experts, so it must be ({count},)"
        )
    found: list[float] = losses.detach().to("cpu", torch.float64).tolist()
    for place, one in enumerate(found):
        if not (is_finite_loss(one) or (infinite and one == math.inf)):
            allowed = f"a number of size at most {LARGEST_LOSS:g}{', or +inf' if infinite else ''}"
            raise ValueError(f"the loss of expert {place} is {one:g}: it must be {allowed}")
    if loss is not None and not is_finite_loss(loss):
        raise ValueError(f"the loss of the aggregate is {loss:g}: it must be a number of size at most {LARGEST_LOSS:g}")
    return found


def weighted_mean(weights: Sequence[float], losses: Sequence[float]) -> float:
    """Return sum_i w_i l_i."""
    return math.fsum(weight * loss for weight, loss in zip(weights, losses, strict=True))


def read_range(low: float, high: float) -> float:
    """Return the width of the range [low, high]; raise ``ValueError`` if it is empty or infinite."""
    width = high - low
    if not 0 < width < math.inf:
        raise ValueError(f"low is {low:g} and high is {high:g}: low must be less than high, and both must be finite")
    return width
