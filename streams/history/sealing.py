"""Seal rounds: copy them from the ledger into the archive, and evict the ledger's copies when it grows too large."""

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
    """How rounds are moved from the ledger into the archive.

    Attributes:
        segment_rounds: the number of rounds that completes a segment.
        segment_bytes: the total size of payloads that completes a segment, if it is reached first.
        ledger_bytes: above this size of the ledger, payloads of sealed rounds are evicted from it, oldest first. Reads
            from the ledger are at least seven times as fast as reads from the archive.
    """

    segment_rounds: Annotated[int, Ge(1)] = 1024
    segment_bytes: Annotated[int, Ge(1)] = 32 * 1024 * 1024
    ledger_bytes: Annotated[int, Ge(0)] = 16 * 1024 * 1024 * 1024


def seal_next(history: History, settings: SealingSettings) -> Marker | None:
    """Seal the oldest unsealed rounds as one segment, and return its marker, or None if they do not fill a segment.

    Rounds whose payload is damaged are left out and stay in the ledger.

    Raises:
        OSError: if the disk of the archive is full or fails.
        ArchiveUnreachable: if the object store cannot be reached.
        HistoryDamaged: if the segment does not read back as written, or none of its rounds can be read.
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
    """Return the rounds from ``first`` on that make up the next segment, all of one layout; [] if there are too few.

    Raises:
        HistoryDamaged: if none of the rounds can be read.
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
    """Return the rounds from ``first`` on that fit into one segment, [] if they do not fill it; reads no payload."""
    sql = """SELECT round, coalesce(bytes, 0) FROM rounds
        WHERE round >= ? AND round IN (SELECT round FROM payloads) ORDER BY round LIMIT ?"""
    found = history.query(sql, (first, settings.segment_rounds))
    full = len(found) == settings.segment_rounds or sum(size for _, size in found) >= settings.segment_bytes
    return [round for round, _ in found] if full else []


def _read_intact(history: History, rounds: Sequence[int]) -> Iterator[tuple[StoredRound, frozenset[Column]]]:
    """Yield the intact rounds with their columns; rounds are read in batches, or one by one in a damaged batch."""
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
    """Evict payloads of sealed rounds from the ledger, oldest first, until it uses at most ``limit`` bytes.

    Before the ledger's copies of a segment are deleted, the segment's files are compared with its marker once more.

    Args:
        history: opened for writing or for maintenance.
        limit: the target size of the ledger in bytes.

    Returns:
        The number of segments whose payloads were evicted.

    Raises:
        HistoryDamaged: if a segment differs from what was published; the ledger then keeps its copy.
        ArchiveUnreachable: if the archive cannot be reached.
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
    """Remove what a killed sealing process left in the archive, if the ledger shows that it is stored elsewhere.

    Returns:
        The markers of segments that the ledger does not list but whose rounds it lacks; these segments stay.
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
            _log.error("the ledger does not list the segment %s and lacks its rounds: verify with --repair", name)
            needed.append(marker)
    archive.remove_orphans()
    return needed
