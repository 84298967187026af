"""Verify a history: read all of it and report every fault."""

import sqlite3
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import NamedTuple

import google_crc32c

from streams.formats.wire import check_id, decode_payload
from streams.history import archive_index, ledger
from streams.history.archive.archive import Archive
from streams.history.errors import HistoryDamaged
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
        elsewhere = round in findings.sealed or archive_index.is_discarded(archive_index.make_query(connection), round)
    except (sqlite3.DatabaseError, UnicodeError):
        findings.damaged.append(round)
        return
    if not payloads:
        if not elsewhere:
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
