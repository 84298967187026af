"""Remove the tasks that retention has thinned out, from the ledger and from the archive, and give their space back."""

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from streams import sealed
from streams.archive.columns import layout
from streams.history import History
from streams.transaction import transaction


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
    sealed.drop_payloads(history.borrow_writer, discarded)
    for group in _group_neighbours(_segment_usage(history, oldest), segment_rounds):
        if 2 * sum(member.live for member in group) <= sum(member.rounds for member in group):
            _merge(history, group, oldest)
    with history.borrow_writer() as writer, transaction(writer):
        writer.execute("DELETE FROM thinned WHERE decided <= ?", (oldest,))
    return len(discarded)


_LIVE = f"(round >= {sealed.LAST_DECISION} OR round IN held OR round IN (SELECT round FROM thinned WHERE decided > ?))"


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
        sealed.record_segments(writer, markers, instead_of=names)
        # In the same moment, so that nobody misses what the segments that go still have of these.
        bounds = (group[0].first, group[-1].last, oldest)
        writer.execute("DELETE FROM thinned WHERE round BETWEEN ? AND ? AND decided <= ?", bounds)
    for name in names:
        history.archive.discard(name)
