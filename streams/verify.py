"""Read all of a history and say everything that is wrong with it."""

import sqlite3
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import NamedTuple

import google_crc32c

from streams import ledger, sealed
from streams.archive.archive import Archive
from streams.arrivals import Rejected
from streams.ledger import HistoryDamaged
from streams.spec import Limits
from streams.wire import check_id, decode_kept

_ROUNDS_AT_ONCE = 1_000
_WHOLE = (
    "SELECT id, crc, EXISTS (SELECT 1 FROM payloads WHERE payloads.round = rounds.round) FROM rounds WHERE round = ?"
)


class Verification(NamedTuple):
    """What a history was found to be; each tuple lists the rounds at fault, in order.

    ``rounds`` is how many were committed when the reading began; ``gaps`` are numbers that no task has; ``missing``
    have no payload; ``damaged`` have a payload that fails its checksum or does not decode; ``stray`` are payloads
    of no round; ``ids`` have an id that is not well-formed or does not lead back to the round; ``structure`` is
    what SQLite says of the file itself, ``archive`` what is wrong with each sealed segment. A round that is damaged in
    one of ledger and archive and whole in the other is in these lists, too, for it has lost its second copy.
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
        """Whether nothing is wrong."""
        return not any(self[1:])


@dataclass
class _Found:
    gaps: list[int] = field(default_factory=list)
    missing: list[int] = field(default_factory=list)
    damaged: list[int] = field(default_factory=list)
    stray: list[int] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    structure: list[str] = field(default_factory=list)
    archive: list[str] = field(default_factory=list)
    sealed: set[int] = field(default_factory=set)  # rounds that read back from the archive and are only there


def verify(path: str | PathLike[str], progress: Callable[[int, int], None] | None = None) -> Verification:
    """Read every round of the history in the folder ``path``, which may be that of a running daemon.

    Rounds committed after it begins are left for the next time. It reads in short steps, so that the daemon's
    write-ahead log can be cut back meanwhile, except during SQLite's own check of the file at the end.

    Args:
        path: the folder of the history.
        progress: called with (rounds read, rounds in all) every now and then.

    Raises:
        HistoryMissing: if there is none.
        HistoryFormatError: if it is something else, or of another format.
        ArchiveAway: if its archive cannot be reached.
    """
    file = Path(path) / ledger.FILE
    connection = ledger.connect(file, write=False)
    found = _Found()
    try:
        rounds = _last(connection, found) + 1
        _check_archive(connection, Path(path), found)
        for first in range(0, rounds, _ROUNDS_AT_ONCE):
            after = min(first + _ROUNDS_AT_ONCE, rounds)
            for round in range(first, after):
                _check_round(connection, round, found)
            _check_stray(connection, first, after, found)
            if progress is not None:
                progress(after, rounds)
        found.structure.extend(_check_structure(connection))
    finally:
        connection.close()
    return Verification(
        rounds,
        gaps=tuple(found.gaps),
        missing=tuple(found.missing),
        damaged=tuple(found.damaged),
        stray=tuple(found.stray),
        ids=tuple(found.ids),
        structure=tuple(found.structure),
        archive=tuple(found.archive),
    )


def _last(connection: sqlite3.Connection, found: _Found) -> int:
    """Return the last round that any table knows, so that a round lost from one of them is seen."""
    last = -1
    for table in ("rounds", "payloads"):
        try:
            last = max(last, connection.execute(f"SELECT coalesce(max(round), -1) FROM {table}").fetchall()[0][0])
        except sqlite3.DatabaseError as error:
            found.structure.append(f"{table}: {error}")
    return last


def _check_archive(connection: sqlite3.Connection, folder: Path, found: _Found) -> None:
    """Read every segment, and compare each of its rounds with what the ledger knows of it."""
    try:
        archive = Archive(sealed.place_of(sealed.ask_of(connection), folder))
        for name in sealed.segment_names(sealed.ask_of(connection)):
            _check_segment(connection, archive, name, found)
    except sqlite3.DatabaseError as error:
        found.structure.append(f"segments: {error}")


def _check_segment(connection: sqlite3.Connection, archive: Archive, name: str, found: _Found) -> None:
    try:
        found.archive.extend(f"{name}: {wrong}" for wrong in archive.check_files(archive.marker(name)))
        rounds = archive.read_all(name)
    except HistoryDamaged as error:
        found.archive.append(str(error))
        return
    for entry, payload in rounds:
        rows = connection.execute(_WHOLE, (entry.round,)).fetchall()
        if rows and rows[0][:2] == (entry.id, entry.crc) and _reads_back(payload, entry.crc):
            found.sealed |= set() if rows[0][2] else {entry.round}
        else:
            found.archive.append(f"{name}: round {entry.round} is not what the ledger knows of it")


def _check_round(connection: sqlite3.Connection, round: int, found: _Found) -> None:
    try:
        rows = connection.execute("SELECT id, crc FROM rounds WHERE round = ?", (round,)).fetchall()
        if not rows:
            found.gaps.append(round)
            return
        id, crc = rows[0]
        if not _leads_back(connection, id, round):
            found.ids.append(round)
        payloads = connection.execute("SELECT payload FROM payloads WHERE round = ?", (round,)).fetchall()
        elsewhere = round in found.sealed or sealed.is_thinned(sealed.ask_of(connection), round)
    except (sqlite3.DatabaseError, UnicodeError):
        found.damaged.append(round)
        return
    if not payloads:
        if not elsewhere:
            found.missing.append(round)
    elif not _reads_back(payloads[0][0], crc):
        found.damaged.append(round)


def _leads_back(connection: sqlite3.Connection, id: object, round: int) -> bool:
    try:
        check_id(str(id), Limits(id_length=1_000_000))
    except Rejected:
        return False
    return connection.execute("SELECT round FROM rounds WHERE id = ?", (id,)).fetchall() == [(round,)]


def _reads_back(payload: object, crc: object) -> bool:
    if not isinstance(payload, bytes) or google_crc32c.value(payload) != crc:
        return False
    try:
        decode_kept(payload)
    except ValueError:
        return False
    return True


def _check_stray(connection: sqlite3.Connection, first: int, after: int, found: _Found) -> None:
    """Find payloads of no round; both are committed together, so even a running daemon has none."""
    question = "SELECT round FROM payloads WHERE round >= ? AND round < ? AND round NOT IN (SELECT round FROM rounds)"
    try:
        found.stray.extend(round for (round,) in connection.execute(question, (first, after)).fetchall())
    except sqlite3.DatabaseError as error:
        found.structure.append(f"payloads {first} to {after - 1}: {error}")


def _check_structure(connection: sqlite3.Connection) -> Iterator[str]:
    try:
        yield from (line for (line,) in connection.execute("PRAGMA quick_check").fetchall() if line != "ok")
    except sqlite3.DatabaseError as error:
        yield f"quick_check: {error}"
