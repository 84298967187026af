"""The write-ahead log of the ledger: what it may grow to."""

import logging
import sqlite3
from pathlib import Path

MOST_BYTES = 64 * 1024 * 1024
"""What the log is cut back to; it is carried into the database every 1,000 pages (16 MB)."""

BESIDE_PAGES, BESIDE_BYTES = 2000, 2 * MOST_BYTES
"""The same for one that writes beside ingest: later, so that it does so only while nothing is appended."""

_log = logging.getLogger(__name__)


def size(file: Path) -> int:
    """Return the bytes of the log of the database ``file``."""
    try:
        return file.with_name(f"{file.name}-wal").stat().st_size
    except FileNotFoundError:
        return 0


def cut_back(writer: sqlite3.Connection, file: Path, limit: int) -> int:
    """Cut the log back if it is over ``limit``; return the ceiling of the next time.

    SQLite carries it into the database every 1,000 pages, but starts it anew only at a moment when nobody reads
    from it, and readers may never pause. This waits half a second for such a moment, and tries again when the log has
    grown by as much again (one long reader, such as a verify, may hold it for minutes). What was written is durable
    already, so an error here is nobody's.
    """
    now = size(file)
    if now <= limit:
        return limit
    busy = 1
    writer.execute("PRAGMA busy_timeout=500").fetchall()
    try:
        busy = writer.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()[0][0]
    except sqlite3.Error as error:
        _log.warning("the write-ahead log of %s could not be cut back: %s", file, error)
    writer.execute("PRAGMA busy_timeout=30000").fetchall()
    return now + MOST_BYTES if busy else MOST_BYTES
