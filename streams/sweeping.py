"""Remove the tasks that retention has thinned out, from the ledger and from the archive, and give their space back."""

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from streams import sealed
from streams.archive.columns import layout
from streams.history import History
from streams.transaction import transaction


class Counted(NamedTuple):
    """A segment with rounds from ``first`` to ``last``, how many it has, and how many of them are still wanted."""

    name: str
    first: int
    last: int
    rounds: int
    wanted: int


def sweep(history: History, oldest: int, segment_rounds: int) -> int:
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
    gone = [r for (r,) in history.ask("SELECT round FROM thinned WHERE decided <= ? ORDER BY round", (oldest,))]
    if not gone:
        return 0
    sealed.drop_payloads(history.writing, gone)
    for group in _group(_count(history, oldest), segment_rounds):
        if 2 * sum(one.wanted for one in group) <= sum(one.rounds for one in group):
            _rewrite(history, group, oldest)
    with history.writing() as writer, transaction(writer):
        writer.execute("DELETE FROM thinned WHERE decided <= ?", (oldest,))
    return len(gone)


_WANTED = f"(round >= {sealed.DECIDED} OR round IN held OR round IN (SELECT round FROM thinned WHERE decided > ?))"


def _count(history: History, oldest: int) -> list[Counted]:
    wanted = f"SELECT count(*) FROM rounds WHERE round BETWEEN first AND last AND {_WANTED}"
    question = f"SELECT name, first, last, count, ({wanted}) FROM segments ORDER BY first"
    return [Counted(*row) for row in history.ask(question, (oldest,))]


def _group(segments: Sequence[Counted], most: int) -> Iterator[list[Counted]]:
    """Yield neighbours together, as long as what is wanted of them fits into one segment."""
    group: list[Counted] = []
    for segment in segments:
        if group and sum(one.wanted for one in group) + segment.wanted > most:
            yield group
            group = []
        group.append(segment)
    if group:
        yield group


def _rewrite(history: History, group: Sequence[Counted], oldest: int) -> None:
    names = [segment.name for segment in group]
    kept = [
        round
        for name in names
        for round in history.archive.read_all(name)
        if history.ask(f"SELECT 1 FROM rounds WHERE round = ? AND {_WANTED}", (round.entry.round, oldest))
    ]
    parts = itertools.groupby(kept, lambda round: layout(round.payload))
    markers = [history.archive.publish(list(part)) for _, part in parts]
    with history.writing() as writer, transaction(writer):
        sealed.record_segments(writer, markers, instead_of=names)
        # In the same moment, so that nobody misses what the segments that go still have of these.
        bounds = (group[0].first, group[-1].last, oldest)
        writer.execute("DELETE FROM thinned WHERE round BETWEEN ? AND ? AND decided <= ?", bounds)
    for name in names:
        history.archive.discard(name)
