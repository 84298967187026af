"""What the ledger knows of the archive: where it is, which rounds are in which segment, which payloads are in both."""

import json
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from streams.history.archive import BlobStore
from streams.history.archive.archive import Marker
from streams.history.archive.stores import is_url, open_store
from streams.history.errors import ArchiveMoved
from streams.history.ledger import transaction

Query = Callable[[str, tuple[Any, ...]], list[Any]]
"""Puts a question in SQL to the ledger."""


ARCHIVE_FOLDER = "archive"


LAST_DECISION = "(SELECT coalesce(max(decided), 0) FROM decisions)"


_BATCH_ROUNDS = 64
"""How many payloads one transaction drops, so that arrivals do not wait for long."""


class Location(NamedTuple):
    """Where an archive lies: a folder or URL (None: beside the ledger), and options for the object store."""

    url: str | None = None
    options: Mapping[str, Any] = {}


def make_query(connection: sqlite3.Connection) -> Query:
    """Return what puts questions to the ledger by one connection."""

    def query(sql: str, values: tuple[Any, ...]) -> list[Any]:
        return connection.execute(sql, values).fetchall()

    return query


def read_location(query: Query) -> Location:
    """Return where the ledger says that its archive is."""
    found = query("SELECT value FROM about WHERE name = 'archive'", ())
    return Location(**json.loads(found[0][0])) if found else Location()


def open_archive_store(query: Query, folder: Path) -> BlobStore:
    """Return the place of the archive that belongs to the ledger in ``folder``; raises as ``open_store_at`` does."""
    return open_store_at(read_location(query), folder)


def open_store_at(location: Location, folder: Path) -> BlobStore:
    """Return the place at a location, which may be said from ``folder`` on.

    Raises:
        ValueError: if the URL or an option is not known.
        ImportError: if it is an object store, and obstore is not installed.
    """
    url, options = location
    if url is None:
        return open_store(str(folder / ARCHIVE_FOLDER), {})
    return open_store(url if is_url(url) else str(folder / url), options)


def record_location(writer: sqlite3.Connection, location: Location) -> None:
    """Note where the archive is from now on.

    Raises:
        ArchiveMoved: if segments are known already, and they lie elsewhere.
    """
    query = make_query(writer)
    before = read_location(query)
    if before.url != location.url and query("SELECT 1 FROM segments LIMIT 1", ()):
        raise ArchiveMoved(
            f"the archive is said to be {_describe(location)}, but rounds of this history lie in {_describe(before)}: "
            "set [history] archive back"
        )
    said = json.dumps({"url": location.url, "options": dict(location.options)})
    writer.execute("INSERT OR REPLACE INTO about VALUES ('archive', ?)", (said,))


def _describe(location: Location) -> str:
    return f"the folder {ARCHIVE_FOLDER!r} beside the ledger" if location.url is None else repr(location.url)


def find_segment(query: Query, round: int) -> str | None:
    """Return the segment that a round should be in, None if it is not sealed."""
    found = query(
        "SELECT name FROM segments WHERE first <= ? AND last >= ? ORDER BY first DESC LIMIT 1", (round, round)
    )
    return str(found[0][0]) if found else None


def is_discarded(query: Query, round: int) -> bool:
    """Return whether retention has taken a round out of play, so that its task may be gone."""
    return bool(query(f"SELECT 1 WHERE ? < {LAST_DECISION} AND ? NOT IN held", (round, round)))


def first_unsealed(query: Query) -> int:
    """Return the round that sealing goes on from: all before it are sealed, thinned or damaged."""
    return int(query("SELECT coalesce(max(last) + 1, 0) FROM segments", ())[0][0])


def list_segments(query: Query) -> list[str]:
    """Return the segments that the ledger knows, by their first rounds."""
    return [str(name) for (name,) in query("SELECT name FROM segments ORDER BY first", ())]


def is_redundant(query: Query, marker: Marker) -> bool:
    """Return whether a segment that the ledger does not know can go: its rounds are elsewhere, or thinned out."""
    elsewhere = """EXISTS (SELECT 1 FROM payloads WHERE payloads.round = rounds.round)
        OR EXISTS (SELECT 1 FROM segments WHERE rounds.round BETWEEN first AND last)"""
    sql = f"""SELECT 1 FROM rounds WHERE round BETWEEN ? AND ? AND NOT ({elsewhere})
        AND (round >= {LAST_DECISION} OR round IN held OR round IN (SELECT round FROM thinned)) LIMIT 1"""
    return not query(sql, (marker.first, marker.last))


def record_segments(writer: sqlite3.Connection, markers: Sequence[Marker], instead_of: Sequence[str] = ()) -> None:
    """Note published segments, in place of others if there are any; it belongs to a ``transaction``."""
    writer.executemany("DELETE FROM segments WHERE name = ?", [(name,) for name in instead_of])
    values = [(marker.first, marker.last, marker.name, marker.count, marker.bytes) for marker in markers]
    writer.executemany("INSERT INTO segments (first, last, name, count, bytes) VALUES (?, ?, ?, ?, ?)", values)


def drop_payloads(borrow_writer: Callable[[], Any], rounds: Sequence[int]) -> None:
    """Take payloads out of the ledger and give their space back, some at a time.

    Args:
        borrow_writer: gives the writer's connection for one transaction, such as ``History.borrow_writer``.
        rounds: whose payloads are sealed and were read back, or are thinned.
    """
    for first in range(0, len(rounds), _BATCH_ROUNDS):
        batch = [(round,) for round in rounds[first : first + _BATCH_ROUNDS]]
        with borrow_writer() as writer:
            with transaction(writer):
                writer.executemany("DELETE FROM payloads WHERE round = ?", batch)
            writer.executescript("PRAGMA incremental_vacuum")  # ``execute`` would free one page only


def ledger_bytes(query: Query) -> int:
    """Return how many bytes of the ledger are in use."""
    pages, free, size = (
        int(query(f"PRAGMA {name}", ())[0][0]) for name in ("page_count", "freelist_count", "page_size")
    )
    return (pages - free) * size
