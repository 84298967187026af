"""A sum over many rounds from an even sample of them, with its standard error."""

import math
from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np

from online_meta.replay import generator
from online_meta.types import ReplayBuffer

SEED_OFFSET = 2
"""Sets the comparators' draws apart from the learners' with the same seed."""


class Sample(NamedTuple):
    """The ``rounds`` of a sample, and how many rounds each of them stands for."""

    rounds: list[int]
    weights: list[float]


class Estimate(NamedTuple):
    """A sum over rounds, and the ``variance`` that sampling gives it; 0 when each round was looked at."""

    total: float
    variance: float


def list_eligible_rounds(buffer: ReplayBuffer, rounds: range, skipped: Collection[int]) -> Sequence[int]:
    """Return which of ``rounds`` count, in ascending order: those that retention has kept and nobody has skipped."""
    kept = np.asarray(buffer.available(rounds.stop), np.int64)
    kept = kept[np.searchsorted(kept, rounds.start) :]
    eligible: Sequence[int] = kept[np.isin(kept, list(skipped), invert=True)]  # type: ignore[assignment]  # 8 bytes each
    return eligible


def sample_rounds(
    eligible: Sequence[int], rounds: range, skipped: Collection[int], max_count: int, seed: int
) -> Sample:
    """Split the ``eligible`` of ``rounds`` into ``max_count`` equal stretches; return one random round of each.

    Those that retention has thinned out are stood for by those that it has kept.
    """
    played = len(rounds) - sum(round in rounds for round in skipped)
    rounds_each = played / max(1, len(eligible))
    count = min(len(eligible), max_count)
    strata = [range(len(eligible) * k // count, len(eligible) * (k + 1) // count) for k in range(count)]
    random = generator(seed + SEED_OFFSET, len(eligible))
    chosen = [int(eligible[stratum[int(random.integers(len(stratum)))]]) for stratum in strata]
    return Sample(chosen, [rounds_each * len(stratum) for stratum in strata])


def estimate_sum(losses: Sequence[float], weights: Sequence[float]) -> Estimate:
    """Sum the losses, each standing for as many rounds as its stretch is long.

    A loss that stands for m rounds adds m (m - 1) s^2 to the variance, s^2 being that of all the losses:
    too much rather than too little where losses drift along the stream.
    """
    total = math.fsum(loss * m for loss, m in zip(losses, weights, strict=True))
    if len(losses) < 2:
        return Estimate(total, 0.0)
    mean = math.fsum(losses) / len(losses)
    variance = math.fsum((loss - mean) ** 2 for loss in losses) / (len(losses) - 1)
    return Estimate(total, variance * sum(m * (m - 1) for m in weights))
