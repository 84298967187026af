"""Repair a history from the second copies of its rounds, in the ledger or in the archive."""

import os
import sqlite3
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import NamedTuple

import google_crc32c

from streams.atomic_files import sync_path
from streams.history import archive_index, errors, ledger
from streams.history.archive.archive import Archive
from streams.history.archive.segment import StoredRound
from streams.history.archive_index import Location
from streams.history.errors import HistoryDamaged
from streams.history.history import History
from streams.history.ledger import insert_entry, transaction
from streams.history.sealing import remove_orphans
from streams.history.verify import Verification


class Repairs(NamedTuple):
    """What a repair did.

    Attributes:
        from_archive: the rounds that are read from the archive from now on.
        segments: the names of the segments that were rewritten.
        strays: the rounds whose stray payloads were removed.
        lost: the damaged segments that could not be rewritten, because the ledger lacks some of their rounds.
    """

    from_archive: tuple[int, ...]
    segments: tuple[str, ...]
    strays: tuple[int, ...]
    lost: tuple[str, ...]


def repair(path: str | PathLike[str], found: Verification) -> Repairs:
    """Repair what ``verify`` found in the history in the folder ``path``, as far as there is a second copy.

    A payload that is damaged in the ledger is deleted there and then read from the archive. A damaged segment is
    rewritten from the ledger if the ledger has all its rounds. Payloads without a round are removed. An only copy is
    never changed.

    Args:
        path: the folder of the history.
        found: what ``verify`` returned for this history.

    Raises:
        HistoryBusy: if the daemon is running.
        HistoryFull, OSError: if the disk is full; repairs made so far are kept.
    """
    with History.open(path, write=True) as history:
        broken = _find_broken_segments(history)
        segments, lost = _rewrite_segments(history, broken)
        damaged = [round for round in found.damaged if _is_sealed(history, round)]
        archive_index.drop_payloads(history.borrow_writer, [*damaged, *found.stray])
        for marker in remove_orphans(history):
            with history.borrow_writer() as writer, transaction(writer):
                archive_index.record_segments(writer, [marker])
    return Repairs(tuple(damaged), tuple(segments), found.stray, tuple(lost))


def _find_broken_segments(history: History) -> list[str]:
    broken = []
    for name in archive_index.list_segments(history.query):
        try:
            is_broken = bool(history.archive.check_files(history.archive.marker(name)))
            stored = history.archive.read_all(name)
            is_broken = is_broken or any(google_crc32c.value(payload) != entry.crc for entry, payload in stored)
        except HistoryDamaged:
            is_broken = True
        if is_broken:
            broken.append(name)
    return broken


def _rewrite_segments(history: History, broken: Sequence[str]) -> tuple[list[str], list[str]]:
    """Rewrite broken segments; return the names of the new segments and of the broken ones that stay."""
    rewritten, lost = [], []
    for name in broken:
        first, last, count = history.query("SELECT first, last, count FROM segments WHERE name = ?", (name,))[0]
        rounds = [stored for round in range(first, last + 1) if (stored := _read_intact(history, round))]
        if len(rounds) < count:
            lost.append(name)
            continue
        marker = history.archive.publish(rounds)
        with history.borrow_writer() as writer, transaction(writer):
            archive_index.record_segments(writer, [marker], instead_of=[name])
        history.archive.discard(name)
        rewritten.append(marker.name)
    return rewritten, lost


def _read_intact(history: History, round: int) -> StoredRound | None:
    found = history.query("SELECT payload FROM payloads WHERE round = ?", (round,))
    entry = history.entry(round)
    intact = bool(found) and google_crc32c.value(found[0][0]) == entry.crc
    return StoredRound(entry, found[0][0]) if intact else None


def _is_sealed(history: History, round: int) -> bool:
    """Return whether the archive has an intact copy of a round."""
    try:
        name = archive_index.find_segment(history.query, round)
        payload = None if name is None else history.archive.payload(name, round)
    except HistoryDamaged:
        return False
    return payload is not None and google_crc32c.value(payload) == history.entry(round).crc


def rebuild_ledger(path: str | PathLike[str], location: Location) -> int:
    """Rebuild a lost ledger from the archive, and return the number of rounds in it.

    Rounds that were not sealed are lost. The other rounds keep their numbers, so gaps remain.

    Args:
        path: the folder of the history.
        location: the location of the archive.

    Raises:
        HistoryBusy: if there is a writer.
        HistoryError: if there is a ledger, which must be moved away first, or if the new one cannot be written.
        HistoryDamaged: if a segment cannot be read; then nothing is created.
    """
    folder = Path(path)
    ledger.refuse_orphan_wal(folder / ledger.FILE)
    if (folder / ledger.FILE).exists():
        raise errors.HistoryError(f"{folder / ledger.FILE} exists: move it away to rebuild it from the archive")
    fresh = folder / ".rebuilt"
    for leftover in fresh.glob("*"):
        leftover.unlink()
    with History.open(fresh, write=True) as history, history.borrow_writer() as writer:
        archive_index.record_location(writer, location)
        archive = Archive(archive_index.open_archive_store(history.query, folder))
        rounds = 0
        for name in archive.names():
            marker = archive.marker(name)
            stored = archive.read_all(name)
            with transaction(writer):
                _insert(writer, stored)
                archive_index.record_segments(writer, [marker])
            rounds += len(stored)
    if (fresh / f"{ledger.FILE}-wal").exists():  # SQLite reports nothing if the checkpoint at closing fails
        raise errors.HistoryError(f"{fresh}: the new ledger could not be written; check the disk and try again")
    for suffix in ("-wal", "-shm"):  # empty: their content was checkpointed into the ledger that is gone
        (folder / f"{ledger.FILE}{suffix}").unlink(missing_ok=True)
    os.replace(fresh / ledger.FILE, folder / ledger.FILE)
    sync_path(folder)
    for leftover in fresh.glob("*"):
        leftover.unlink()
    fresh.rmdir()
    return rounds


def _insert(writer: sqlite3.Connection, rounds: Sequence[StoredRound]) -> None:
    for entry, payload in rounds:
        insert_entry(writer, entry, len(payload))
    cursors = {entry.source: entry.cursor for entry, _ in rounds if entry.cursor is not None}
    writer.executemany("INSERT OR REPLACE INTO cursors VALUES (?, ?)", cursors.items())
