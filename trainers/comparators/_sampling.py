"""Estimate a sum over many rounds, and its variance, from an evenly spread sample of those that retention kept."""

import math
from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from online_meta.replay import generator
from online_meta.types import ReplayBuffer
from trainers.comparators import ComparatorUnavailable

SEED_OFFSET = 2
"""Keeps the comparators' random numbers apart from the learners', which use the same seed."""
WIDEST_GAP = 10
"""Retained rounds lie a mean distance apart. A gap before the first of more than this many distances, which random
thinning leaves once in 22,000 times, means that retention has discarded everything before."""


class Coverage(NamedTuple):
    """The rounds that a sum can be estimated for.

    Attributes:
        first: the first round that is covered; earlier ones are gone for good, as under retention by age.
        rounds: the covered rounds that are retained and not skipped, in ascending order, int64.
        weights: how many of the covered rounds that are not skipped each of them stands for.
    """

    first: int
    rounds: NDArray[np.int64]
    weights: NDArray[np.float64]


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


def list_unread_rounds(buffer: ReplayBuffer, rounds: range, skipped: Collection[int]) -> list[int]:
    """Return those of ``rounds`` that are not skipped, in ascending order, for comparators that read each round once.

    Raises ``ComparatorUnavailable`` if one of them is gone.
    """
    found = [int(round) for round in list_eligible_rounds(buffer, rounds, skipped)]
    if len(found) < len(rounds) - sum(round in rounds for round in skipped):
        raise ComparatorUnavailable(
            f"retention has taken rounds from {rounds.start} on before they were read, so the exact loss is not known "
            "any more: lower [regret] every_rounds, or let retention keep more"
        )
    return found


def find_coverage(buffer: ReplayBuffer, rounds: range, skipped: Collection[int]) -> Coverage:
    """Return which of ``rounds`` a sum can be estimated for, and what each retained round stands for.

    Retention keeps a round of a stratum with one probability: below its last decision that of the round's source, and 1
    from there on. So each retained round of a stratum stands for the same number of its rounds (post-stratification),
    which is the inverse of its inclusion probability. Where the retained rounds only begin after a gap that random
    thinning cannot have left, no weight can make up for what is before: the coverage begins after the gap.
    """
    eligible = np.asarray(list_eligible_rounds(buffer, rounds, skipped), np.int64)
    if not len(eligible):
        return Coverage(rounds.start, eligible, np.zeros(0))
    gone = np.array(sorted(round for round in skipped if round in rounds), np.int64)
    first, played = rounds.start, np.setdiff1d(np.arange(rounds.start, rounds.stop), gone, assume_unique=True)
    distance = max(1.0, (rounds.stop - eligible[0]) / len(eligible))
    if eligible[0] - (played[0] if len(played) else first) > WIDEST_GAP * distance:
        first = int(eligible[0])
        played = played[played >= first]
    strata = getattr(buffer, "retention_strata", None)
    labels = np.zeros(len(played), np.int64) if strata is None else np.asarray(strata(played))
    return Coverage(first, eligible, _weigh(played, labels, eligible))


def _weigh(played: NDArray[np.int64], labels: NDArray[np.int64], eligible: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return how many played rounds of its stratum each eligible round stands for."""
    own = labels[np.searchsorted(played, eligible)]
    weights = np.zeros(len(eligible))
    for label in np.unique(own):
        weights[own == label] = (labels == label).sum() / (own == label).sum()
    # A stratum without a retained round is shared among all others.
    shared: NDArray[np.float64] = weights * (len(played) / weights.sum())
    return shared


def sample_rounds(coverage: Coverage, max_count: int, seed: int) -> Sample:
    """Split the retained rounds of a coverage into ``max_count`` stretches; return one random round of each.

    Each stretch has about the same number of retained rounds, and the round that is drawn stands for all that they
    stand for. A round is drawn with a probability in proportion to what it stands for itself.
    """
    eligible, weights = coverage.rounds, coverage.weights
    count = min(len(eligible), max_count)
    random = generator(seed + SEED_OFFSET, len(eligible))
    chosen, totals = [], []
    for k in range(count):
        stretch = slice(len(eligible) * k // count, len(eligible) * (k + 1) // count)
        ends = np.cumsum(weights[stretch])
        at = min(int(np.searchsorted(ends, random.random() * ends[-1], side="right")), len(ends) - 1)
        chosen.append(int(eligible[stretch][at]))
        totals.append(float(ends[-1]))
    return Sample(chosen, totals)


def estimate_sum(losses: Sequence[float], weights: Sequence[float]) -> Estimate:
    """Return the sum of the losses, each weighted by the length of its stretch.

    A loss that stands for m rounds adds m (m - 1) s^2 to the variance, where s^2 is the variance of the losses of all
    rounds, estimated with the same weights. If losses drift along the stream, this overestimates the variance.
    """
    total = math.fsum(loss * m for loss, m in zip(losses, weights, strict=True))
    if len(losses) < 2:
        return Estimate(total, 0.0)
    mean = total / math.fsum(weights)
    squares = math.fsum(m * (loss - mean) ** 2 for loss, m in zip(losses, weights, strict=True))
    variance = squares / math.fsum(weights) * len(losses) / (len(losses) - 1)
    return Estimate(total, variance * sum(m * max(m - 1, 0.0) for m in weights))
