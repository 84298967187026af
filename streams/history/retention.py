"""Which past rounds are kept for replay, when not all can be: thinned out so that those that stay are a fair sample.

A decision is written down before the next round is committed, so that it is a fact of the history: learners of that
round and of all later ones do without the rounds that it takes, whenever and however often they are played. Rounds
that are taken keep their number and their id; their tasks are removed when no checkpoint is older than the decision.
"""

import itertools
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple, overload

import numpy as np
from annotated_types import Ge, Gt
from numpy.typing import NDArray

from streams.history import archive_index
from streams.history.archive.columns import layout
from streams.history.archive_index import LAST_DECISION, Query
from streams.history.history import History
from streams.history.ledger import transaction


class SegmentUsage(NamedTuple):
    """A segment with rounds from ``first`` to ``last``, how many it has, and how many of them are still wanted."""

    name: str
    first: int
    last: int
    rounds: int
    live: int


def compact(history: History, oldest: int, segment_rounds: int) -> int:
    """Remove the tasks that were thinned out by decisions that no checkpoint is older than; returns how many.

    Segments that have lost half of their rounds are put together with their neighbours, up to ``segment_rounds``.

    Args:
        history: open to write.
        oldest: how many rounds the oldest checkpoint has learned; only later ones are ever played again.
        segment_rounds: how many rounds a segment holds at most.

    Raises:
        HistoryDamaged: if a segment that would be written anew cannot be read; it stays.
        HistoryFull, OSError: if the disk takes no more.
        ArchiveAway: if the archive cannot be reached.
    """
    discarded = [r for (r,) in history.query("SELECT round FROM thinned WHERE decided <= ? ORDER BY round", (oldest,))]
    if not discarded:
        return 0
    archive_index.drop_payloads(history.borrow_writer, discarded)
    for group in _group_neighbours(_segment_usage(history, oldest), segment_rounds):
        if 2 * sum(member.live for member in group) <= sum(member.rounds for member in group):
            _merge(history, group, oldest)
    with history.borrow_writer() as writer, transaction(writer):
        writer.execute("DELETE FROM thinned WHERE decided <= ?", (oldest,))
    return len(discarded)


_LIVE = (
    f"(round >= {archive_index.LAST_DECISION} OR round IN held "
    "OR round IN (SELECT round FROM thinned WHERE decided > ?))"
)


def _segment_usage(history: History, oldest: int) -> list[SegmentUsage]:
    live = f"SELECT count(*) FROM rounds WHERE round BETWEEN first AND last AND {_LIVE}"
    sql = f"SELECT name, first, last, count, ({live}) FROM segments ORDER BY first"
    return [SegmentUsage(*row) for row in history.query(sql, (oldest,))]


def _group_neighbours(segments: Sequence[SegmentUsage], max_rounds: int) -> Iterator[list[SegmentUsage]]:
    """Yield neighbours together, as long as what is wanted of them fits into one segment."""
    group: list[SegmentUsage] = []
    for segment in segments:
        if group and sum(member.live for member in group) + segment.live > max_rounds:
            yield group
            group = []
        group.append(segment)
    if group:
        yield group


def _merge(history: History, group: Sequence[SegmentUsage], oldest: int) -> None:
    names = [segment.name for segment in group]
    stored = [
        round
        for name in names
        for round in history.archive.read_all(name)
        if history.query(f"SELECT 1 FROM rounds WHERE round = ? AND {_LIVE}", (round.entry.round, oldest))
    ]
    parts = itertools.groupby(stored, lambda round: layout(round.payload))
    markers = [history.archive.publish(list(part)) for _, part in parts]
    with history.borrow_writer() as writer, transaction(writer):
        archive_index.record_segments(writer, markers, instead_of=names)
        # In the same moment, so that nobody misses what the segments that go still have of these.
        bounds = (group[0].first, group[-1].last, oldest)
        writer.execute("DELETE FROM thinned WHERE round BETWEEN ? AND ? AND decided <= ?", bounds)
    for name in names:
        history.archive.discard(name)


DAY_SECONDS = 86_400.0


TOURNAMENT_ROUNDS = 48
"""Of a tournament: more than any run has rounds, as a power of two."""


COIN_SALT = 1 << 62
"""Sets what the coins are a hash of apart from round numbers."""


@dataclass(frozen=True)
class RetentionSettings:
    """What is kept for replay; without a limit, everything.

    Between two decisions a tenth more than the limits may be kept.

    Attributes:
        rounds: at most so many rounds.
        bytes: at most so many bytes of payloads, as they arrived.
        age_days: none that arrived so many days before the newest one.
        thin: "reservoir" keeps each round with the same probability; "stratified" the same share of each stratum.
        strata: what "stratified" goes by. "source": as many rounds of each source, as far as it has them, and each of a
            source's rounds with the same probability. "time": of every stretch of the run the same share, see
            ``stratified_priorities``.
    """

    rounds: Annotated[int, Ge(1)] | None = None
    bytes: Annotated[int, Ge(1)] | None = None
    age_days: Annotated[float, Gt(0)] | None = None
    thin: Literal["reservoir", "stratified"] = "reservoir"
    strata: tuple[Literal["source", "time"], ...] = ("source", "time")

    @property
    def limited(self) -> bool:
        """Whether there is a limit."""
        return (self.rounds, self.bytes, self.age_days) != (None, None, None)


class Candidates(NamedTuple):
    """Rounds that may be kept, with what decides on it: ``arrived`` in unix seconds, ``bytes`` of the payload."""

    rounds: NDArray[np.int64]
    sources: NDArray[np.str_]
    arrived: NDArray[np.float64]
    bytes: NDArray[np.int64]


class RetainedRounds(Sequence[int]):
    """The rounds below ``count`` that are kept: the ``sample`` of those below ``decided``, and all from there on."""

    def __init__(self, sample: NDArray[np.int64], decided: int, count: int) -> None:
        """``sample`` is in ascending order."""
        self._sample, self._rest = sample, range(decided, count)

    def __array__(self, dtype: object = None, copy: bool | None = None) -> NDArray[np.int64]:
        """Return them as NumPy has them."""
        return np.concatenate([self._sample, np.arange(self._rest.start, self._rest.stop)])

    def __len__(self) -> int:
        """Return how many they are."""
        return len(self._sample) + len(self._rest)

    @overload
    def __getitem__(self, at: int, /) -> int: ...
    @overload
    def __getitem__(self, at: slice, /) -> Sequence[int]: ...
    def __getitem__(self, at: int | slice, /) -> int | Sequence[int]:
        """Return the round in that place, in ascending order; of a slice, a list of them."""
        if isinstance(at, slice):
            return [self[index] for index in range(*at.indices(len(self)))]
        if not -len(self) <= at < len(self):
            raise IndexError(f"{at} is not among the {len(self)} rounds that are kept")
        at %= len(self)
        return int(self._sample[at]) if at < len(self._sample) else self._rest[at - len(self._sample)]


def last_decision(query: Query, count: int) -> int:
    """Return the decision that holds after ``count`` rounds, as the number of rounds there were; 0: none."""
    return int(query("SELECT coalesce(max(decided), 0) FROM decisions WHERE decided < ?", (count,))[0][0])


def retained_rounds(query: Query, decided: int) -> NDArray[np.int64]:
    """Return the rounds before the decision that it has kept, in ascending order.

    As long as a checkpoint is older than a later decision, what that one took is still known.
    """
    sql = """SELECT round FROM held WHERE round < ?
        UNION SELECT round FROM thinned WHERE round < ? AND decided > ? ORDER BY round"""
    return np.array([round for (round,) in query(sql, (decided,) * 3)], np.int64)


def count_discarded(query: Query) -> int:
    """Return how many rounds have been removed."""
    sql = f"""SELECT min(count(*), {LAST_DECISION}) - (SELECT count(*) FROM held) - (SELECT count(*) FROM thinned)
        FROM rounds WHERE round < {LAST_DECISION}"""
    return int(query(sql, ())[0][0])


def select_retained(candidates: Candidates, settings: RetentionSettings, now: float = math.inf) -> NDArray[np.bool_]:
    """Return which candidates are kept: a pure function, and one that never wants back what it gave up before.

    Each round has a priority, a function of its number alone; of those that are young enough, those of the lowest
    priorities stay, as many as the limits allow.
    """
    strata = settings.strata if settings.thin == "stratified" else ()
    rank = stratified_priorities if "time" in strata else hash_priorities
    keep = np.ones(len(candidates.rounds), bool)
    if settings.age_days is not None:
        newest = min(candidates.arrived.max(initial=0.0), now)  # A clock that was ahead once makes nothing old.
        keep &= candidates.arrived >= newest - settings.age_days * DAY_SECONDS
    order = np.argsort(rank(candidates.rounds), kind="stable")
    order = order[keep[order]]
    if "source" in strata:
        order = _interleave_sources(order, candidates.sources)
    if settings.rounds is not None:
        order = order[: settings.rounds]
    if settings.bytes is not None:
        order = order[np.cumsum(candidates.bytes[order]) <= settings.bytes]
    chosen = np.zeros_like(keep)
    chosen[order] = True
    return chosen


def _interleave_sources(order: NDArray[np.int64], sources: NDArray[np.str_]) -> NDArray[np.int64]:
    """Return ``order`` so that the sources take turns: the first of each, then the second of each, and so on."""
    turn = np.zeros(len(order), np.int64)
    for source in np.unique(sources[order]):
        of_source = sources[order] == source
        turn[of_source] = np.arange(of_source.sum())
    return order[np.argsort(turn, kind="stable")]


def hash_priorities(rounds: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Return a hash of each round, uniform over 64 bits (the finalizer of SplitMix64, Steele et al., 2014)."""
    with np.errstate(over="ignore"):
        mixed = (rounds.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def stratified_priorities(rounds: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Return a priority of each round, uniform over 64 bits, so that the lowest are spread evenly over the run.

    Of every 2^k rounds that begin at a multiple of 2^k, exactly one has a priority below 2^(64 - k), and each of them
    with the same probability: the rounds play a tournament, two by two, then the winners of neighbouring pairs, and so
    on, each game decided by a coin of its own. No stratum has bounds that would have to move as the run grows.
    """
    won, playing, game = np.zeros(len(rounds), np.uint64), np.ones(len(rounds), bool), rounds.astype(np.int64)
    for height in range(TOURNAMENT_ROUNDS):
        side, game = game & 1, game >> 1
        coin = hash_priorities(game * TOURNAMENT_ROUNDS + height + COIN_SALT) & np.uint64(1)
        playing = playing & (side.astype(np.uint64) == coin)
        if not playing.any():
            break
        won += playing
    top = np.uint64(1) << np.uint64(63)
    return (top | (hash_priorities(rounds) >> np.uint64(1))) >> won


def subsample(history: History, settings: RetentionSettings) -> int:
    """Decide which rounds are kept from now on; returns how many are taken out of play, 0 if too few to bother.

    Raises:
        HistoryFull: if the disk takes no more; nothing is decided then.
    """
    candidates = _candidates(history.query)
    taken = candidates.rounds[~select_retained(candidates, settings, time.time())].tolist()
    if len(taken) <= len(candidates.rounds) // 11:
        return 0
    with history.borrow_writer() as writer, transaction(writer):
        before = last_decision(history.query, len(history) + 1)
        decided = int(writer.execute("SELECT max(round) + 1 FROM rounds").fetchall()[0][0])
        writer.execute("INSERT OR IGNORE INTO decisions VALUES (?)", (decided,))
        writer.execute("INSERT INTO held SELECT round FROM rounds WHERE round >= ?", (before,))
        writer.executemany("DELETE FROM held WHERE round = ?", [(round,) for round in taken])
        writer.executemany("INSERT INTO thinned VALUES (?, ?)", [(round, decided) for round in taken])
    return len(taken)


def _candidates(query: Query) -> Candidates:
    sql = f"""SELECT round, source, arrived, coalesce(bytes, 0) FROM rounds
        WHERE round IN held OR round >= {LAST_DECISION} ORDER BY round"""
    rows = query(sql, ())
    rounds, sources, arrived, sizes = zip(*rows, strict=True) if rows else ((), (), (), ())
    return Candidates(
        np.array(rounds, np.int64), np.array(sources, str), np.array(arrived, np.float64), np.array(sizes, np.int64)
    )
