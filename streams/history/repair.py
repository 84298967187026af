"""Mend a history out of what it holds twice: in the ledger and in the archive."""

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
    """What was done: rounds whose payload or entry was taken from the archive, segments written anew, strays removed.

    ``lost`` are the damaged segments that could not be written anew, for the ledger lacks some of their rounds.
    """

    from_archive: tuple[int, ...]
    segments: tuple[str, ...]
    strays: tuple[int, ...]
    lost: tuple[str, ...]


def repair(path: str | PathLike[str], found: Verification) -> Repairs:
    """Mend in the history in the folder ``path`` what ``verify`` has ``found``, as far as there is a second copy.

    A payload that is damaged in the ledger is read from the archive from then on; a damaged segment is written anew
    from the ledger, if that has all of it; payloads of no round are removed. Nothing that is the only copy is touched.

    Raises:
        HistoryBusy: if the daemon is running.
        HistoryFull, OSError: if the disk takes no more; what was mended so far stays mended.
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
    """Return the segments that took the place of broken ones, and those that could not be replaced."""
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
    """Return whether the archive has a whole copy of a round."""
    try:
        name = archive_index.find_segment(history.query, round)
        payload = None if name is None else history.archive.payload(name, round)
    except HistoryDamaged:
        return False
    return payload is not None and google_crc32c.value(payload) == history.entry(round).crc


def rebuild_ledger(path: str | PathLike[str], location: Location) -> int:
    """Make the ledger anew out of the archive when it is gone; returns how many rounds it has then.

    Rounds that were not sealed yet are lost with it. Gaps stay gaps: the rounds keep their numbers.

    Raises:
        HistoryBusy: if there is a writer.
        HistoryError: if there is a ledger: move it away first; if the new one could not be written out.
        HistoryDamaged: if a segment cannot be read; nothing is made then.
    """
    folder = Path(path)
    ledger.refuse_orphan_wal(folder / ledger.FILE)
    if (folder / ledger.FILE).exists():
        raise errors.HistoryError(f"{folder / ledger.FILE} is there: move it away to make it anew from the archive")
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
    if (fresh / f"{ledger.FILE}-wal").exists():  # SQLite says nothing when closing cannot carry the log over.
        raise errors.HistoryError(f"{fresh}: the new ledger could not be written out; see to the disk and do it again")
    for suffix in ("-wal", "-shm"):  # Empty: what was in them was carried into the ledger that is gone.
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
