"""Verify a history and repair it: read all of it, report every fault, and restore rounds from their second copies."""

import os
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import NamedTuple

import google_crc32c

from streams.atomic_files import sync_path
from streams.formats.wire import check_id, decode_payload
from streams.history import archive_index, errors, ledger
from streams.history.archive.archive import Archive
from streams.history.archive.segment import StoredRound
from streams.history.archive_index import Location
from streams.history.errors import HistoryDamaged
from streams.history.history import History
from streams.history.ledger import insert_entry, transaction
from streams.history.sealing import remove_orphans
from streams.spec import Limits
from streams.types import Rejected

_BATCH_ROUNDS = 1_000
_ROUND_SQL = (
    "SELECT id, crc, EXISTS (SELECT 1 FROM payloads WHERE payloads.round = rounds.round) FROM rounds WHERE round = ?"
)


class Verification(NamedTuple):
    """The result of a verification; tuples of integers list the faulty rounds in order.

    A round that is damaged in the ledger or in the archive but intact in the other is listed too, because it has lost
    its second copy.

    Attributes:
        rounds: how many rounds were committed when the verification began.
        gaps: round numbers without a task.
        missing: rounds without a payload.
        damaged: rounds whose payload fails its checksum or cannot be decoded.
        stray: the numbers of payloads without a round.
        ids: rounds whose id is malformed or does not resolve to the round.
        structure: SQLite's findings about the file.
        archive: the faults of sealed segments.
    """

    rounds: int
    gaps: tuple[int, ...]
    missing: tuple[int, ...]
    damaged: tuple[int, ...]
    stray: tuple[int, ...]
    ids: tuple[int, ...]
    structure: tuple[str, ...]
    archive: tuple[str, ...] = ()

    @property
    def clean(self) -> bool:
        """Whether no fault was found."""
        return not any(self[1:])


@dataclass
class _Findings:
    gaps: list[int] = field(default_factory=list)
    missing: list[int] = field(default_factory=list)
    damaged: list[int] = field(default_factory=list)
    stray: list[int] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    structure: list[str] = field(default_factory=list)
    archive: list[str] = field(default_factory=list)
    sealed: set[int] = field(default_factory=set)  # rounds that read back from the archive and are only there


def verify(path: str | PathLike[str], progress: Callable[[int, int], None] | None = None) -> Verification:
    """Read and check every round of a history; a daemon may be running on it.

    Rounds committed after the start are not checked. The function reads in short steps, so that the daemon can truncate
    its write-ahead log in between, except during SQLite's own check of the file at the end.

    Args:
        path: the folder of the history.
        progress: called with (rounds read, rounds in total) after every 1,000 rounds and at the end.

    Returns:
        All faults that were found.

    Raises:
        HistoryMissing: if there is no history.
        HistoryFormatError: if the file is not a history or has an unsupported format.
        ArchiveUnreachable: if the archive cannot be reached.
    """
    file = Path(path) / ledger.FILE
    connection = ledger.connect(file, write=False)
    findings = _Findings()
    try:
        rounds = _last_round(connection, findings) + 1
        _check_archive(connection, Path(path), findings)
        for first in range(0, rounds, _BATCH_ROUNDS):
            after = min(first + _BATCH_ROUNDS, rounds)
            for round in range(first, after):
                _check_round(connection, round, findings)
            _check_stray(connection, first, after, findings)
            if progress is not None:
                progress(after, rounds)
        findings.structure.extend(_check_structure(connection))
    finally:
        connection.close()
    return Verification(
        rounds,
        gaps=tuple(findings.gaps),
        missing=tuple(findings.missing),
        damaged=tuple(findings.damaged),
        stray=tuple(findings.stray),
        ids=tuple(findings.ids),
        structure=tuple(findings.structure),
        archive=tuple(findings.archive),
    )


def _last_round(connection: sqlite3.Connection, findings: _Findings) -> int:
    """Return the last round that any table has, so that a round lost from one table is noticed."""
    last = -1
    for table in ("rounds", "payloads"):
        try:
            last = max(last, connection.execute(f"SELECT coalesce(max(round), -1) FROM {table}").fetchall()[0][0])
        except sqlite3.DatabaseError as error:
            findings.structure.append(f"{table}: {error}")
    return last


def _check_archive(connection: sqlite3.Connection, folder: Path, findings: _Findings) -> None:
    """Read every segment and compare each of its rounds with the ledger."""
    try:
        archive = Archive(archive_index.open_archive_store(archive_index.make_query(connection), folder))
        for name in archive_index.list_segments(archive_index.make_query(connection)):
            _check_segment(connection, archive, name, findings)
    except sqlite3.DatabaseError as error:
        findings.structure.append(f"segments: {error}")


def _check_segment(connection: sqlite3.Connection, archive: Archive, name: str, findings: _Findings) -> None:
    try:
        findings.archive.extend(f"{name}: {wrong}" for wrong in archive.check_files(archive.marker(name)))
        rounds = archive.read_all(name)
    except HistoryDamaged as error:
        findings.archive.append(str(error))
        return
    for entry, payload in rounds:
        rows = connection.execute(_ROUND_SQL, (entry.round,)).fetchall()
        if rows and rows[0][:2] == (entry.id, entry.crc) and _is_intact(payload, entry.crc):
            findings.sealed |= set() if rows[0][2] else {entry.round}
        else:
            findings.archive.append(f"{name}: round {entry.round} differs from the ledger")


def _check_round(connection: sqlite3.Connection, round: int, findings: _Findings) -> None:
    try:
        rows = connection.execute("SELECT id, crc FROM rounds WHERE round = ?", (round,)).fetchall()
        if not rows:
            findings.gaps.append(round)
            return
        id, crc = rows[0]
        if not _id_resolves(connection, id, round):
            findings.ids.append(round)
        payloads = connection.execute("SELECT payload FROM payloads WHERE round = ?", (round,)).fetchall()
        query = archive_index.make_query(connection)
        gone = archive_index.is_discarded(query, round) or archive_index.is_forgotten(query, round)
    except (sqlite3.DatabaseError, UnicodeError):
        findings.damaged.append(round)
        return
    if not payloads:
        if round not in findings.sealed and not gone:
            findings.missing.append(round)
    elif not _is_intact(payloads[0][0], crc):
        findings.damaged.append(round)


def _id_resolves(connection: sqlite3.Connection, id: object, round: int) -> bool:
    try:
        check_id(str(id), Limits(id_length=1_000_000))
    except Rejected:
        return False
    return connection.execute("SELECT round FROM rounds WHERE id = ?", (id,)).fetchall() == [(round,)]


def _is_intact(payload: object, crc: object) -> bool:
    if not isinstance(payload, bytes) or google_crc32c.value(payload) != crc:
        return False
    try:
        decode_payload(payload)
    except ValueError:
        return False
    return True


def _check_stray(connection: sqlite3.Connection, first: int, after: int, findings: _Findings) -> None:
    """Find payloads without a round; both are committed together, so even a running daemon never has any."""
    sql = "SELECT round FROM payloads WHERE round >= ? AND round < ? AND round NOT IN (SELECT round FROM rounds)"
    try:
        findings.stray.extend(round for (round,) in connection.execute(sql, (first, after)).fetchall())
    except sqlite3.DatabaseError as error:
        findings.structure.append(f"payloads {first} to {after - 1}: {error}")


def _check_structure(connection: sqlite3.Connection) -> Iterator[str]:
    try:
        yield from (line for (line,) in connection.execute("PRAGMA quick_check").fetchall() if line != "ok")
    except sqlite3.DatabaseError as error:
        yield f"quick_check: {error}"


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
