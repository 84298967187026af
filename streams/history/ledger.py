"""Create, open, write and lock the ledger: the SQLite database in WAL mode that holds the history.

SQLite, instead of a custom format, commits payload, id and source position in one transaction, survives kill -9 and
power loss (WAL, synchronous=FULL), serves many reader processes during writes, and releases space. Pages of 16 KiB
suit payloads of tens of kB.
"""

import contextlib
import errno
import fcntl
import logging
import os
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import google_crc32c

from streams.atomic_files import sync_path
from streams.history.errors import (
    HistoryBusy,
    HistoryDamaged,
    HistoryError,
    HistoryFormatError,
    HistoryFull,
    HistoryMissing,
)
from streams.types import Conflict, Receipt, Record, Scales

_STATEMENT_ROWS = 64
"""How many records one statement inserts."""


class RoundEntry(NamedTuple):
    """The metadata of a round.

    Attributes:
        round: its number, from 0.
        id: the task's id.
        source: the name of the source.
        digest: the SHA-256 of the body as received, 32 bytes.
        crc: the crc32c of the payload.
        arrived: the Unix time of arrival in seconds.
        cursor: the source's position after the task, None if the source has no positions.
    """

    round: int
    id: str
    source: str
    digest: bytes
    crc: int
    arrived: float
    cursor: str | None


_INTO_ROUNDS = f"INSERT INTO rounds ({', '.join((*RoundEntry._fields, 'bytes'))})"


def commit(writer: sqlite3.Connection, records: Sequence[Record]) -> list[Receipt | Conflict]:
    """Commit all records durably, or none, and return a receipt or a conflict for each, in order.

    Round numbers are consecutive. A record whose id is known, also from earlier in the same transaction, adds no round.

    Raises:
        sqlite3.Error: if the database cannot be written; the transaction is then rolled back.
    """
    with transaction(writer):
        next_round = int(writer.execute("SELECT coalesce(max(round) + 1, 0) FROM rounds").fetchall()[0][0])
        answers: list[Receipt | Conflict] = []
        for first in range(0, len(records), _STATEMENT_ROWS):
            batch = records[first : first + _STATEMENT_ROWS]
            found = _assign_rounds(batch, _known(writer, batch), next_round)
            new = [(answer.round, record) for record, answer in zip(batch, found, strict=True) if _is_new(answer)]
            _insert_rounds(writer, new)
            next_round += len(new)
            answers += found
        cursors = {record.source: record.cursor for record in records if record.cursor is not None}
        writer.executemany("INSERT OR REPLACE INTO cursors VALUES (?, ?)", cursors.items())
    return answers


@contextlib.contextmanager
def transaction(writer: sqlite3.Connection) -> Iterator[None]:
    """Commit everything that the block writes durably at its end, or roll it back if the block raises."""
    writer.execute("BEGIN IMMEDIATE")
    try:
        yield
        writer.execute("COMMIT")
    except BaseException:
        with contextlib.suppress(sqlite3.Error):
            writer.execute("ROLLBACK")  # after a full disk SQLite may have rolled back already
        raise


def _known(writer: sqlite3.Connection, records: Sequence[Record]) -> dict[str, tuple[int, bytes]]:
    """Return the round and digest of each id that is already committed."""
    sql = f"SELECT id, round, digest FROM rounds WHERE id IN ({', '.join('?' * len(records))})"
    found = writer.execute(sql, [record.id for record in records]).fetchall()
    return {id: (round, digest) for id, round, digest in found}


def _assign_rounds(
    records: Sequence[Record], known: dict[str, tuple[int, bytes]], next_round: int
) -> list[Receipt | Conflict]:
    """Return the receipt or conflict of each record, and add new ids to ``known``."""
    answers: list[Receipt | Conflict] = []
    for record in records:
        round, digest = known.setdefault(record.id, (next_round, record.digest))
        new = round == next_round
        same = digest == record.digest
        answers.append(Receipt(record.id, round, duplicate=not new) if same else Conflict(record.id, round))
        next_round += new
    return answers


def _is_new(answer: Receipt | Conflict) -> bool:
    return isinstance(answer, Receipt) and not answer.duplicate


def _insert_rounds(writer: sqlite3.Connection, new: Sequence[tuple[int, Record]]) -> None:
    if not new:
        return
    entries = [
        RoundEntry(
            round,
            record.id,
            record.source,
            record.digest,
            google_crc32c.value(record.payload),
            record.arrived,
            record.cursor,
        )
        for round, record in new
    ]
    _insert_many(
        writer, _INTO_ROUNDS, [(*entry, len(record.payload)) for entry, (_, record) in zip(entries, new, strict=True)]
    )
    _insert_many(writer, "INSERT INTO payloads", [(round, record.payload) for round, record in new])
    scales = [(round, record.source, *record.scales) for round, record in new if record.scales is not None]
    if scales:
        writer.execute(SCALES_TABLE)
        _insert_many(writer, "INSERT INTO scales", scales)


def has_table(query: Callable[..., list[Any]], name: str) -> bool:
    """Return whether the ledger has a table that is only made when it is needed.

    Args:
        query: runs an SQL query on the ledger and returns all rows.
        name: of the table.
    """
    return bool(query("SELECT 1 FROM sqlite_master WHERE name = ?", (name,)))


def read_scales(query: Callable[..., list[Any]], source: str, count: int) -> list[Scales]:
    """Return the scales of the newest ``count`` rounds of a source that have any, oldest first.

    Args:
        query: runs an SQL query on the ledger and returns all rows.
        source: the name of the source.
        count: the largest number of rounds.
    """
    if not has_table(query, "scales"):
        return []
    newest = query("SELECT x, y FROM scales WHERE source = ? ORDER BY round DESC LIMIT ?", (source, count))
    return [Scales(x, y) for x, y in reversed(newest)]


def insert_entry(writer: sqlite3.Connection, entry: RoundEntry, size: int) -> None:
    """Insert the metadata of a round whose payload has ``size`` bytes; call it within a ``transaction``."""
    _insert_many(writer, _INTO_ROUNDS, [(*entry, size)])


def _insert_many(writer: sqlite3.Connection, into: str, rows: Sequence[tuple[Any, ...]]) -> None:
    """Insert rows with one statement, because this thread may lose the interpreter lock after each statement."""
    row = f"({', '.join('?' * len(rows[0]))})"
    writer.execute(f"{into} VALUES {', '.join([row] * len(rows))}", [value for values in rows for value in values])


MAX_WAL_BYTES = 64 * 1024 * 1024
"""The size above which the write-ahead log (WAL) is truncated; SQLite checkpoints it every 1,000 pages (16 MB)."""


WAL_BACKGROUND_PAGES, WAL_BACKGROUND_BYTES = 2000, 2 * MAX_WAL_BYTES
"""Higher thresholds for background writers, so that they checkpoint and truncate the WAL only when ingest is idle."""


_log = logging.getLogger(__name__)


def wal_size(file: Path) -> int:
    """Return the size of the write-ahead log of the database ``file`` in bytes, 0 if there is none."""
    try:
        return file.with_name(f"{file.name}-wal").stat().st_size
    except FileNotFoundError:
        return 0


def truncate_wal(writer: sqlite3.Connection, file: Path, limit: int) -> int:
    """Truncate the write-ahead log if it is larger than ``limit``, and return the limit for the next call.

    SQLite checkpoints the log every 1,000 pages but restarts it only when no reader uses it, and readers may never
    pause. This call waits up to half a second for such a moment. If a reader holds the log for longer, as ``verify``
    may, the next limit is ``MAX_WAL_BYTES`` above the current size. Errors are only logged, because everything written
    is already durable.

    Args:
        writer: the writer's connection.
        file: the database.
        limit: the size in bytes up to which nothing is done.
    """
    now = wal_size(file)
    if now <= limit:
        return limit
    busy = 1
    writer.execute("PRAGMA busy_timeout=500").fetchall()
    try:
        busy = writer.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()[0][0]
    except sqlite3.Error as error:
        _log.warning("the write-ahead log of %s could not be truncated: %s", file, error)
    writer.execute("PRAGMA busy_timeout=30000").fetchall()
    return now + MAX_WAL_BYTES if busy else MAX_WAL_BYTES


FILE = "ledger.sqlite"


WRITER_LOCK = "writer.lock"


MAINTENANCE_LOCK = "upkeep.lock"


EXIT_GRACE_SECONDS = 10.0
"""How long to wait for an exiting process, which may be in the middle of a write to a slow disk."""


APPLICATION_ID = 0x6F6D6574


FORMAT = 2
"""Format 1 had neither segments nor discarded rounds; readers accept it, and the next writer migrates it."""


PAGE_BYTES = 16 * 1024


ARCHIVE_TABLES = """
CREATE {kind} segments (                -- published in the archive; each round is in one at most
    first INTEGER PRIMARY KEY,
    last  INTEGER NOT NULL,
    name  TEXT NOT NULL UNIQUE,
    count INTEGER NOT NULL,             -- rounds in it: those with a damaged payload are left out
    bytes INTEGER NOT NULL
);
CREATE {kind} decisions (decided INTEGER PRIMARY KEY);  -- how many rounds there were when retention thinned them out
CREATE {kind} held (round INTEGER PRIMARY KEY);         -- the rounds before the last decision that it has kept
CREATE {kind} thinned (                 -- those that it has not, until their space is given back
    round   INTEGER PRIMARY KEY,
    decided INTEGER NOT NULL
);
"""


SCALES_TABLE = """
CREATE TABLE IF NOT EXISTS scales (  -- made with the first task of a source that refuses outliers
    round  INTEGER PRIMARY KEY,
    source TEXT NOT NULL,
    x      REAL,                     -- root mean squares; NULL where there is none
    y      REAL
)
"""


SCHEMA = """
CREATE TABLE rounds (
    round   INTEGER PRIMARY KEY CHECK (round >= 0),
    id      TEXT NOT NULL UNIQUE,
    source  TEXT NOT NULL,
    digest  BLOB NOT NULL,     -- SHA-256 of the body as received
    crc     INTEGER NOT NULL,  -- crc32c of the payload as kept
    arrived REAL NOT NULL,     -- unix seconds
    cursor  TEXT,              -- the source's position behind this task
    bytes   INTEGER            -- of the payload
);
CREATE TABLE payloads (round INTEGER PRIMARY KEY, payload BLOB NOT NULL);
CREATE TABLE cursors (source TEXT PRIMARY KEY, cursor TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE about (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
"""


_NO_SPACE = (
    sqlite3.SQLITE_IOERR_WRITE,
    sqlite3.SQLITE_IOERR_FSYNC,
    sqlite3.SQLITE_IOERR_DIR_FSYNC,
    sqlite3.SQLITE_IOERR_TRUNCATE,
    sqlite3.SQLITE_IOERR_SHMSIZE,
    sqlite3.SQLITE_IOERR_SHMOPEN,
    sqlite3.SQLITE_IOERR_SHMMAP,
)


@contextlib.contextmanager
def translate_errors(file: Path) -> Iterator[None]:
    """Translate errors of SQLite and the system about a full disk or a damaged file into errors of the history."""
    try:
        yield
    except sqlite3.DatabaseError as error:
        code = getattr(error, "sqlite_errorcode", None) or 0
        if code == sqlite3.SQLITE_FULL or code in _NO_SPACE:
            raise HistoryFull(f"{file}: the disk is full ({error}); free some space and try again") from error
        if code & 0xFF in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
            raise HistoryDamaged(f"{file}: {error}; verify the history and restore it from a copy") from error
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise HistoryFull(f"{file}: the disk is full ({error}); free some space and try again") from error
        raise


def connect(file: Path, *, write: bool) -> sqlite3.Connection:
    """Open the database and check its format.

    A reader (``write=False``) cannot change the database; in particular, it never checkpoints the write-ahead log.
    The format is queried through SQLite instead of read from the file, because closing a descriptor of our own would
    drop the locks that other connections of this process hold on the file.

    Raises:
        HistoryMissing: if the file does not exist.
        HistoryFormatError: if the file is not a history or has an unsupported format.
        HistoryError: if this user may not open the file, or may not write the shared-memory file next to it.
    """
    if not file.exists():
        raise HistoryMissing(f"{file.parent}: there is no history here ({file.name} is missing)")
    uri = f"{file.resolve().as_uri()}?mode={'rw' if write else 'ro'}"
    try:
        connection = sqlite3.connect(uri, uri=True, isolation_level=None, check_same_thread=False, timeout=30.0)
    except sqlite3.OperationalError as error:
        raise HistoryError(f"{file} cannot be opened: {error}; may this user read it?") from error
    try:
        version = _check_format(connection, file)
        if write:
            _configure_writer(connection, file)
        if version == 1:
            _migrate(connection, write=write)
    except BaseException:
        connection.close()
        raise
    return connection


def _check_format(connection: sqlite3.Connection, file: Path) -> int:
    try:
        application = connection.execute("PRAGMA application_id").fetchall()[0][0]
        version = connection.execute("PRAGMA user_version").fetchall()[0][0]
    except sqlite3.DatabaseError as error:
        if error.sqlite_errorcode & 0xFF == sqlite3.SQLITE_NOTADB:
            raise HistoryFormatError(
                f"{file} is not a history (not an SQLite database); it is left untouched"
            ) from error
        if error.sqlite_errorcode & 0xFF in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN):
            raise HistoryError(
                f"{file.parent} must be writable, even to read it ({error}); copy it elsewhere"
            ) from error
        with translate_errors(file):
            raise
    if application != APPLICATION_ID:
        raise HistoryFormatError(
            f"{file} is not a history (an SQLite database of another program); it is left untouched"
        )
    if version not in (1, FORMAT):
        raise HistoryFormatError(
            f"{file} has format {version}; this version reads 1 and {FORMAT}; it is left untouched"
        )
    return int(version)


def _migrate(connection: sqlite3.Connection, *, write: bool) -> None:
    """Add what a ledger of format 1 lacks: a writer changes the file, a reader adds temporary tables."""
    if not write:
        connection.executescript(ARCHIVE_TABLES.format(kind="TEMP TABLE"))
        return
    tables = ARCHIVE_TABLES.format(kind="TABLE")
    sizes = "(SELECT length(payload) FROM payloads WHERE payloads.round = rounds.round)"
    columns = f"ALTER TABLE rounds ADD COLUMN bytes INTEGER; UPDATE rounds SET bytes = {sizes};"
    connection.executescript(f"BEGIN IMMEDIATE; {tables} {columns} PRAGMA user_version={FORMAT}; COMMIT;")


def _configure_writer(connection: sqlite3.Connection, file: Path) -> None:
    mode = connection.execute("PRAGMA journal_mode=wal").fetchall()[0][0]
    if mode != "wal":
        raise HistoryError(
            f"{file}: this file system cannot hold a write-ahead log (journal mode {mode}); use a local disk"
        )
    for setting in ("synchronous=FULL", "fullfsync=ON", "checkpoint_fullfsync=ON", "wal_autocheckpoint=1000"):
        connection.execute(f"PRAGMA {setting}")
    connection.execute(f"PRAGMA journal_size_limit={MAX_WAL_BYTES}").fetchall()


def create(file: Path) -> None:
    """Create an empty history atomically: the file appears under its name complete and durable, or not at all.

    Raises:
        HistoryDamaged: if there is a write-ahead log without its database; it may contain rounds.
        HistoryFull: if the disk is full.
    """
    refuse_orphan_wal(file)
    fresh = file.with_name(f".new-{file.name}")
    for suffix in ("", "-journal", "-wal", "-shm"):
        fresh.with_name(fresh.name + suffix).unlink(missing_ok=True)
    with translate_errors(file):
        _create_empty(fresh)
        sync_path(fresh)
        fresh.rename(file)
        sync_path(file.parent)


def refuse_orphan_wal(file: Path) -> None:
    """Raise ``HistoryDamaged`` if there is a write-ahead log without its database; it may contain rounds."""
    if not file.exists() and wal_size(file):
        raise HistoryDamaged(f"{file}-wal has lost its {file.name}: restore that file, or move the log away")


def _create_empty(file: Path) -> None:
    connection = sqlite3.connect(file, isolation_level=None)
    try:
        connection.execute(f"PRAGMA page_size={PAGE_BYTES}")
        connection.execute("PRAGMA auto_vacuum=INCREMENTAL")  # so that deleting sealed payloads can release space
        connection.execute(f"PRAGMA application_id={APPLICATION_ID}")
        connection.execute(f"PRAGMA user_version={FORMAT}")
        connection.executescript(SCHEMA + ARCHIVE_TABLES.format(kind="TABLE"))
        connection.execute("INSERT INTO about VALUES ('created', ?)", (str(time.time()),))
        connection.execute("PRAGMA journal_mode=wal").fetchall()
    finally:
        connection.close()


def make_folder(folder: Path) -> None:
    """Create the folder and its parents durably."""
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    with translate_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for path in new:
            sync_path(path.parent)


def acquire_lock(folder: Path, name: str = WRITER_LOCK, timeout: float = 0.0) -> int:
    """Acquire a lock that lasts while the returned descriptor is open; the kernel releases that of a dead process.

    Args:
        folder: the folder of the history.
        name: ``WRITER_LOCK`` for the process that appends, ``MAINTENANCE_LOCK`` for the maintenance process.
        timeout: how long to wait for the lock, in seconds.

    Raises:
        HistoryBusy: if another process holds the lock.
    """
    with translate_errors(folder):
        descriptor = os.open(folder / name, os.O_RDWR | os.O_CREAT, 0o600)
    deadline = time.monotonic() + timeout
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return descriptor
        except BlockingIOError:
            if time.monotonic() >= deadline:
                os.close(descriptor)
                what = "a writer" if name == WRITER_LOCK else "a maintenance process"
                raise HistoryBusy(f"{folder} already has {what}; stop it first (reading needs no lock)") from None
            time.sleep(0.02)


def wait_for_maintenance(folder: Path) -> None:
    """Wait until the maintenance process of an earlier, dead writer has exited.

    Raises:
        HistoryBusy: if it does not exit in time.
    """
    if (folder / MAINTENANCE_LOCK).exists():
        os.close(acquire_lock(folder, MAINTENANCE_LOCK, EXIT_GRACE_SECONDS))
