"""Seal rounds: from the ledger into the archive, beside ingest; the ledger's copy goes when there is too much of it."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge

from streams.history import archive_index, errors
from streams.history.archive.archive import Marker
from streams.history.archive.columns import Column, layout
from streams.history.archive.segment import StoredRound
from streams.history.errors import HistoryDamaged, HistoryError
from streams.history.history import History
from streams.history.ledger import RoundEntry, transaction

READ_BATCH = 64
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SealingSettings:
    """How rounds go from the ledger into the archive.

    Attributes:
        segment_rounds: how many rounds one segment holds.
        segment_bytes: or how many bytes of payloads, whichever comes first.
        ledger_bytes: payloads of sealed rounds leave the ledger, the oldest first, when it holds more bytes than this;
            those that are in it are read seven times as quickly and more.
    """

    segment_rounds: Annotated[int, Ge(1)] = 1024
    segment_bytes: Annotated[int, Ge(1)] = 32 * 1024 * 1024
    ledger_bytes: Annotated[int, Ge(0)] = 16 * 1024 * 1024 * 1024


def seal_next(history: History, settings: SealingSettings) -> Marker | None:
    """Seal the oldest rounds that are not sealed yet; returns None when they do not fill a segment.

    Rounds whose payload is damaged are left out, and stay where they are.

    Raises:
        OSError: if the archive takes no more, or cannot be reached.
        HistoryDamaged: if the segment does not read back as it was written.
    """
    first = archive_index.first_unsealed(history.query)
    rounds = select_rounds(history, first, settings)
    if not rounds:
        return None
    marker = history.archive.publish(rounds)
    with history.borrow_writer() as writer, transaction(writer):
        archive_index.record_segments(writer, [marker])
    return marker


def select_rounds(history: History, first: int, settings: SealingSettings) -> list[StoredRound]:
    """Return the rounds from ``first`` on that make one segment: of one layout, as many as ``settings`` say.

    Nothing is returned when there are not enough yet. Raises ``HistoryDamaged`` when none of them can be read.
    """
    size, taken = 0, list[StoredRound]()
    columns, rounds = None, _segment_candidates(history, first, settings)
    for stored, its_columns in _read_intact(history, rounds):
        if columns not in (None, its_columns):
            break
        taken.append(stored)
        columns, size = its_columns, size + len(stored.payload)
        if size >= settings.segment_bytes:
            break
    if rounds and not taken:
        raise HistoryDamaged(f"none of the rounds {rounds[0]} to {rounds[-1]} can be read")
    return taken


def _segment_candidates(history: History, first: int, settings: SealingSettings) -> Sequence[int]:
    """Return the rounds from ``first`` on that one segment can hold; none if they do not fill one: nothing is read."""
    sql = """SELECT round, coalesce(bytes, 0) FROM rounds
        WHERE round >= ? AND round IN (SELECT round FROM payloads) ORDER BY round LIMIT ?"""
    found = history.query(sql, (first, settings.segment_rounds))
    full = len(found) == settings.segment_rounds or sum(size for _, size in found) >= settings.segment_bytes
    return [round for round, _ in found] if full else []


def _read_intact(history: History, rounds: Sequence[int]) -> Iterator[tuple[StoredRound, frozenset[Column]]]:
    """Give the rounds that can be sealed, with their columns; some are read at once, all if none is damaged."""
    for first in range(0, len(rounds), READ_BATCH):
        batch = rounds[first : first + READ_BATCH]
        try:
            found = list(zip(_entries(history, batch), history.payloads(batch), strict=True))
        except HistoryError:
            found = [*filter(None, (_read(history, round) for round in batch))]
        for entry, payload in found:
            try:
                yield StoredRound(entry, payload), layout(payload)
            except ValueError as error:
                _log.error("round %d is not sealed: %s", entry.round, error)


def _entries(history: History, rounds: Sequence[int]) -> list[RoundEntry]:
    sql = f"SELECT {', '.join(RoundEntry._fields)} FROM rounds WHERE round IN ({', '.join('?' * len(rounds))})"
    return [RoundEntry(*found) for found in history.query(f"{sql} ORDER BY round", tuple(rounds))]


def _read(history: History, round: int) -> tuple[RoundEntry, bytes] | None:
    try:
        return history.entry(round), history.payload(round)
    except errors.RoundDiscarded:
        return None
    except HistoryDamaged as error:
        _log.error("round %d is not sealed: %s", round, error)
        return None


def evict_payloads(history: History, limit: int) -> int:
    """Take payloads of sealed rounds out of the ledger, the oldest first, until it uses at most ``limit`` bytes.

    Returns how many segments' worth were taken. The read-back check was made when they were published; here each
    segment's files are compared with its marker once more.

    Raises:
        HistoryDamaged: if a segment is not what was published; the ledger keeps its copy then.
        ArchiveAway: if the archive cannot be reached.
    """
    sql = """SELECT name FROM segments
        WHERE last - first + 1 - count < (SELECT count(*) FROM payloads WHERE round BETWEEN first AND last)
        ORDER BY first LIMIT 1"""
    evicted, archive = 0, history.archive
    while archive_index.ledger_bytes(history.query) > limit and (found := history.query(sql)):
        name = found[0][0]
        if wrong := archive.check_files(archive.marker(name)):
            raise HistoryDamaged(f"the segment {name} is damaged: {'; '.join(wrong)}; verify the history with --repair")
        archive_index.drop_payloads(history.borrow_writer, archive.segment(name).rounds.tolist())
        evicted += 1
    return evicted


def remove_orphans(history: History) -> list[Marker]:
    """Remove from the archive what a sealer that was killed has left behind; the ledger knows where else it all is.

    Returns the segments that the ledger does not know and cannot do without, which stay.
    """
    known = set(archive_index.list_segments(history.query))
    archive, needed = history.archive, []
    for name in archive.names():
        if name in known:
            continue
        marker = archive.marker(name)
        if archive_index.is_redundant(history.query, marker):
            archive.discard(name)
        else:
            _log.error("the ledger does not know the segment %s, and lacks its rounds: verify with --repair", name)
            needed.append(marker)
    archive.remove_orphans()
    return needed
