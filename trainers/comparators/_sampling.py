"""Estimate a sum over many rounds, and its variance, from an evenly spread sample."""

import math
from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np

from online_meta.replay import generator
from online_meta.types import ReplayBuffer

SEED_OFFSET = 2
"""Keeps the comparators' random numbers apart from the learners', which use the same seed."""


class Sample(NamedTuple):
    """The ``rounds`` of a sample, and the number of rounds that each of them stands for."""

    rounds: list[int]
    weights: list[float]


class Estimate(NamedTuple):
    """A sum over rounds, and its ``variance`` due to sampling, 0 if every round is in the sample."""

    total: float
    variance: float


def list_eligible_rounds(buffer: ReplayBuffer, rounds: range, skipped: Collection[int]) -> Sequence[int]:
    """Return those of ``rounds`` that are retained and not skipped, in ascending order."""
    kept = np.asarray(buffer.available(rounds.stop), np.int64)
    kept = kept[np.searchsorted(kept, rounds.start) :]
    eligible: Sequence[int] = kept[np.isin(kept, list(skipped), invert=True)]  # type: ignore[assignment]  # 8 bytes each
    return eligible


def sample_rounds(
    eligible: Sequence[int], rounds: range, skipped: Collection[int], max_count: int, seed: int
) -> Sample:
    """Split the ``eligible`` of ``rounds`` into ``max_count`` equal stretches; return one random round of each.

    Retained rounds stand for those that retention has discarded.
    """
    played = len(rounds) - sum(round in rounds for round in skipped)
    rounds_each = played / max(1, len(eligible))
    count = min(len(eligible), max_count)
    strata = [range(len(eligible) * k // count, len(eligible) * (k + 1) // count) for k in range(count)]
    random = generator(seed + SEED_OFFSET, len(eligible))
    chosen = [int(eligible[stratum[int(random.integers(len(stratum)))]]) for stratum in strata]
    return Sample(chosen, [rounds_each * len(stratum) for stratum in strata])


def estimate_sum(losses: Sequence[float], weights: Sequence[float]) -> Estimate:
    """Return the sum of the losses, each weighted by the length of its stretch.

    A loss that stands for m rounds adds m (m - 1) s^2 to the variance, where s^2 is the variance of all losses. If
    losses drift along the stream, this overestimates the variance.
    """
    total = math.fsum(loss * m for loss, m in zip(losses, weights, strict=True))
    if len(losses) < 2:
        return Estimate(total, 0.0)
    mean = math.fsum(losses) / len(losses)
    variance = math.fsum((loss - mean) ** 2 for loss in losses) / (len(losses) - 1)
    return Estimate(total, variance * sum(m * (m - 1) for m in weights))
