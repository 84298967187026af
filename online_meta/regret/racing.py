"""Race contestants on the same rounds: by intervals that hold at all times, or by successive halving."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from typing import NamedTuple

from online_meta.regret.differences import ALPHA, Differences, confidence_sequence

FRACTION = 3
"""In successive halving, the best one in ``FRACTION`` goes on, and plays ``FRACTION`` times as many rounds."""
NO_DIFFERENCES = Differences(0, 0.0, 0.0)


class Race(NamedTuple):
    """The state of a race, which is plain data.

    Attributes:
        entered: the names of all contestants, in their order; they are the number of comparisons.
        racing: those that are not dropped.
        totals: the sum of the losses of each that races, in units of the loss.
        pairs: of two that race, the earlier one first: sums over the paired differences "first minus second".
        rounds: the number of rounds so far.
    """

    entered: tuple[str, ...]
    racing: tuple[str, ...]
    totals: dict[str, float]
    pairs: dict[tuple[str, str], Differences]
    rounds: int = 0


class Loser(NamedTuple):
    """A contestant that is behind another one.

    Attributes:
        name: the contestant that is behind.
        against: the one that is ahead: it had the smallest total loss.
        mean: the mean of the paired differences "loss of ``name`` minus loss of ``against``".
        low: the lower end of the interval for it, above 0.
        high: its upper end.
    """

    name: str
    against: str
    mean: float
    low: float
    high: float


def add_difference(differences: Differences, difference: float) -> Differences:
    """Return the sums with one more paired difference."""
    rounds, total, squares = differences
    return Differences(rounds + 1, total + difference, squares + difference * difference)


def start_race(names: Iterable[str]) -> Race:
    """Return a race of ``names`` before its first round. Raises ``ValueError`` for a repeated name, or none."""
    entered = tuple(names)
    if not entered or len(set(entered)) < len(entered):
        raise ValueError(f"the contestants are {[*entered]}: a race has one or more, each once")
    return Race(entered, entered, dict.fromkeys(entered, 0.0), dict.fromkeys(combinations(entered, 2), NO_DIFFERENCES))


def observe(race: Race, losses: Mapping[str, float]) -> Race:
    """Return the race after one more round.

    Args:
        race: before the round.
        losses: the loss of each that races, made before learning; a finite number. Further names are ignored.

    Raises:
        ValueError: if one that races has no loss.
    """
    if missing := [name for name in race.racing if name not in losses]:
        raise ValueError(f"{', '.join(missing)} has no loss in a round of the race")
    return race._replace(
        totals={name: total + losses[name] for name, total in race.totals.items()},
        pairs={pair: add_difference(sums, losses[pair[0]] - losses[pair[1]]) for pair, sums in race.pairs.items()},
        rounds=race.rounds + 1,
    )


def find_best(race: Race) -> str:
    """Return who has the smallest total loss of those that race; of equal ones, the first."""
    return min(race.racing, key=race.totals.__getitem__)


def find_losers(race: Race, alpha: float = ALPHA) -> list[Loser]:
    """Return those that are behind the best so far: successive elimination by anytime-valid intervals.

    A contestant is dropped at the first round at which the interval of ``confidence_sequence`` for the mean of its
    paired differences from the best so far lies above 0. Of N contestants, each interval has the level
    alpha / (N (N - 1) / 2). So, with a probability that tends to 1 - ``alpha``, no interval of any two ever misses the
    mean of their conditional expectations, and whoever is dropped was behind another one in that mean: Even-Dar, Mannor
    and Mansour ("Action elimination and stopping conditions for the multi-armed bandit", JMLR 7, 2006), with intervals
    of paired differences. With that probability, one with the smallest expected loss in every round is never dropped,
    and one that is behind it by a gap g in every round is dropped by the first round at which the interval of these two
    is shorter than g.

    The mean is over the rounds so far: one that begins badly and would later have been ahead can be dropped.

    Args:
        race: the state of the race.
        alpha: the chance of a wrong elimination in the whole race, in (0, 1).

    Returns:
        Those to drop, in their order; never the best so far.

    Raises:
        ValueError: if ``alpha`` is out of range.
    """
    best, found = find_best(race), []
    level = alpha / max(len(race.entered) * (len(race.entered) - 1) / 2, 1)
    for name in race.racing:
        if name != best:
            differences = _differences_of(race, name, best)
            interval = confidence_sequence(differences, level)
            if interval is not None and interval[0] > 0:
                found.append(Loser(name, best, differences.mean(), *interval))
    return found


def _differences_of(race: Race, name: str, other: str) -> Differences:
    """Return the sums over the differences "``name`` minus ``other``"."""
    if (name, other) in race.pairs:
        return race.pairs[name, other]
    found = race.pairs[other, name]
    return found._replace(total=-found.total)


def drop(race: Race, names: Iterable[str]) -> Race:
    """Return the race without ``names``. Raises ``ValueError`` if nobody would be left."""
    gone = set(names)
    racing = tuple(name for name in race.racing if name not in gone)
    if not racing:
        raise ValueError("nobody would be left in the race: the best one stays")
    return race._replace(
        racing=racing,
        totals={name: race.totals[name] for name in racing},
        pairs={pair: sums for pair, sums in race.pairs.items() if not gone & set(pair)},
    )


def list_prefixes(rounds: int, least: int) -> list[int]:
    """Return the numbers of rounds that successive halving compares after: ``rounds``, and parts of at least ``least``.

    They ascend, each about ``FRACTION`` times the one before it.
    """
    found = [rounds]
    while found[0] // FRACTION >= least:
        found.insert(0, found[0] // FRACTION)
    return found


def goes_on(mean: float, means: Sequence[float]) -> bool:
    """Return whether a contestant goes on after a prefix: it is in the best one in ``FRACTION``, or the best.

    This is successive halving of contestants that come one after another (Li et al., "A system for massively parallel
    hyperparameter tuning", MLSys 2020).

    Args:
        mean: its mean loss over the prefix.
        means: those of all that have played the prefix so far, its own among them.
    """
    return mean <= sorted(means)[max(len(means) // FRACTION, 1) - 1]
