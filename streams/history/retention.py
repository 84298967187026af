"""Select which past rounds are retained for replay when storage is limited, as an unbiased sample.

Each decision is recorded in the history before the next round is committed. Learners of that round and of all later
rounds do not replay the rounds that the decision discards, however often the history is replayed. Discarded rounds
keep their numbers and ids; their tasks are deleted once every checkpoint is newer than the decision.
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
    """The use of a segment: its first and last round, how many ``rounds`` it has and how many are still needed.

    The segment may lack rounds between ``first`` and ``last``. ``live`` counts the rounds that are still needed.
    """

    name: str
    first: int
    last: int
    rounds: int
    live: int


def compact(history: History, oldest: int, segment_rounds: int) -> int:
    """Delete the tasks discarded by decisions that no checkpoint predates, and return how many.

    Neighbouring segments that have lost half of their rounds are merged, up to ``segment_rounds`` rounds each.

    Args:
        history: opened for writing or for maintenance.
        oldest: how many rounds the oldest checkpoint has learned; only later rounds are ever played again.
        segment_rounds: the largest number of rounds in a segment.

    Raises:
        HistoryDamaged: if a segment that would be rewritten cannot be read; it stays.
        HistoryFull, OSError: if the disk is full.
        ArchiveUnreachable: if the archive cannot be reached.
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
    """Yield groups of neighbouring segments whose live rounds fit into one segment."""
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
        # In the same transaction, so that no reader looks for these rounds in the segments that are removed.
        bounds = (group[0].first, group[-1].last, oldest)
        writer.execute("DELETE FROM thinned WHERE round BETWEEN ? AND ? AND decided <= ?", bounds)
    for name in names:
        history.archive.discard(name)


DAY_SECONDS = 86_400.0


TOURNAMENT_ROUNDS = 48
"""The height of a tournament: 2^48 is more than the number of rounds of any run."""


COIN_SALT = 1 << 62
"""Separates the hash inputs of the coins from round numbers."""


@dataclass(frozen=True)
class RetentionSettings:
    """How much of the history is retained for replay; without a limit, all of it.

    Between two decisions, up to a tenth more than the limits may be retained.

    Attributes:
        rounds: the largest number of rounds.
        bytes: the largest total size of the payloads, in bytes.
        age_days: the largest age of a round in days, relative to the newest arrival.
        thin: "reservoir" retains each round with the same probability; "stratified" the same share of each stratum.
        strata: the strata of "stratified". "source": the same number of rounds of each source, as far as it has them,
            and each round of a source with the same probability. "time": the same share of every interval of the run,
            see ``stratified_priorities``.
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
    """Rounds that may be retained, with the properties that the selection uses; all arrays have the same length.

    Attributes:
        rounds: round numbers, ascending.
        sources: the names of their sources.
        arrived: their Unix times of arrival in seconds.
        bytes: the sizes of their payloads.
    """

    rounds: NDArray[np.int64]
    sources: NDArray[np.str_]
    arrived: NDArray[np.float64]
    bytes: NDArray[np.int64]


_NO_ROUNDS: NDArray[np.int64] = np.array([], np.int64)


class RetainedRounds(Sequence[int]):
    """The rounds below ``count`` that may be revisited: a sample of those below ``decided``, and later ones.

    Args:
        sample: of the rounds below ``decided``, in ascending order.
        decided: number of rounds when retention made its last decision; 0 if there was none.
        count: number of rounds.
        excluded: rounds from ``decided`` on that are left out, in ascending order.
    """

    def __init__(
        self, sample: NDArray[np.int64], decided: int, count: int, excluded: NDArray[np.int64] = _NO_ROUNDS
    ) -> None:
        """Prepare to find a round by its index."""
        excluded = excluded[: np.searchsorted(excluded, count)]
        self._sample, self._rest, self._excluded = sample, range(decided, count), excluded
        self._gaps = excluded - decided - np.arange(len(excluded))
        """How many later rounds that are not excluded come before each excluded one."""

    def __array__(self, dtype: object = None, copy: bool | None = None) -> NDArray[np.int64]:
        """Return the rounds as an int64 array of shape (len(self),)."""
        rest = np.arange(self._rest.start, self._rest.stop)
        return np.concatenate([self._sample, np.setdiff1d(rest, self._excluded, assume_unique=True)])

    def __len__(self) -> int:
        """Return the number of rounds."""
        return len(self._sample) + len(self._rest) - len(self._excluded)

    @overload
    def __getitem__(self, at: int, /) -> int: ...
    @overload
    def __getitem__(self, at: slice, /) -> Sequence[int]: ...
    def __getitem__(self, at: int | slice, /) -> int | Sequence[int]:
        """Return the round at an index, in ascending order, or a list of rounds for a slice."""
        if isinstance(at, slice):
            return [self[index] for index in range(*at.indices(len(self)))]
        if not -len(self) <= at < len(self):
            raise IndexError(f"index {at} is out of range: {len(self)} rounds are retained")
        at %= len(self)
        if at < len(self._sample):
            return int(self._sample[at])
        later = at - len(self._sample)
        return self._rest[later + int(np.searchsorted(self._gaps, later, side="right"))]


def last_decision(query: Query, count: int) -> int:
    """Return the decision in force after ``count`` rounds, as the number of rounds when it was made; 0 if none."""
    return int(query("SELECT coalesce(max(decided), 0) FROM decisions WHERE decided < ?", (count,))[0][0])


def retained_rounds(query: Query, decided: int) -> NDArray[np.int64]:
    """Return the rounds that a decision retained, in ascending order, as an int64 array.

    A round that a later decision discarded is still known here while a checkpoint predates that decision.
    """
    sql = """SELECT round FROM held WHERE round < ?
        UNION SELECT round FROM thinned WHERE round < ? AND decided > ? ORDER BY round"""
    return np.array([round for (round,) in query(sql, (decided,) * 3)], np.int64)


def count_discarded(query: Query) -> int:
    """Return the number of rounds whose tasks have been deleted."""
    sql = f"""SELECT min(count(*), {LAST_DECISION}) - (SELECT count(*) FROM held) - (SELECT count(*) FROM thinned)
        FROM rounds WHERE round < {LAST_DECISION}"""
    return int(query(sql, ())[0][0])


def list_removed(query: Query, first: int) -> list[int]:
    """Return the rounds from ``first`` on whose tasks retention has removed, or may have."""
    sql = f"""SELECT round FROM rounds WHERE round >= ? AND round < {LAST_DECISION}
        AND round NOT IN held AND round NOT IN (SELECT round FROM thinned) ORDER BY round"""
    return [round for (round,) in query(sql, (first,))]


def select_retained(candidates: Candidates, settings: RetentionSettings, now: float = math.inf) -> NDArray[np.bool_]:
    """Select the candidates to retain; a pure function that never selects a round which it discarded before.

    Each round has a priority that depends only on its number. Of the rounds within the age limit, those with the lowest
    priorities are retained, as many as the limits allow.

    Args:
        candidates: n rounds.
        settings: the limits and the strata.
        now: the Unix time in seconds, an upper bound for times of arrival.

    Returns:
        A mask of shape (n,).
    """
    strata = settings.strata if settings.thin == "stratified" else ()
    rank = stratified_priorities if "time" in strata else hash_priorities
    keep = np.ones(len(candidates.rounds), bool)
    if settings.age_days is not None:
        newest = min(candidates.arrived.max(initial=0.0), now)  # a clock that was once ahead must not age rounds
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
    """Reorder ``order`` so that the sources alternate: the first round of each, then the second of each, and so on."""
    turn = np.zeros(len(order), np.int64)
    for source in np.unique(sources[order]):
        of_source = sources[order] == source
        turn[of_source] = np.arange(of_source.sum())
    return order[np.argsort(turn, kind="stable")]


def hash_priorities(rounds: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Hash each round number uniformly over 64 bits (the finalizer of SplitMix64, Steele et al., 2014)."""
    with np.errstate(over="ignore"):
        mixed = (rounds.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def stratified_priorities(rounds: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Return a priority for each round, uniform over 64 bits, such that the lowest are spread evenly over the run.

    Of every 2^k rounds that begin at a multiple of 2^k, exactly one has a priority below 2^(64 - k), each with the same
    probability. The rounds play a tournament: first in pairs, then the winners of neighbouring pairs, and so on, with
    one random coin per game. So no stratum has boundaries that would move as the run grows.
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
    """Decide which rounds are retained from now on, and return the number of discarded rounds.

    If at most one round in eleven would be discarded, no decision is made and the result is 0.

    Raises:
        HistoryFull: if the disk is full; then no decision is made.
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
