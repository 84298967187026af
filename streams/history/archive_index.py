"""Query and update the ledger's index of the archive: its location, its segments and the payloads that it holds."""

import json
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from streams.history.archive import BlobStore
from streams.history.archive.archive import Marker
from streams.history.archive.stores import is_url, open_store
from streams.history.errors import ArchiveMoved
from streams.history.ledger import has_table, transaction

Query = Callable[[str, tuple[Any, ...]], list[Any]]
"""Runs an SQL statement with parameters on the ledger and returns all rows."""


ARCHIVE_FOLDER = "archive"


LAST_DECISION = "(SELECT coalesce(max(decided), 0) FROM decisions)"


_BATCH_ROUNDS = 64
"""How many payloads one transaction deletes; small, so that arrivals do not wait for long."""


class Location(NamedTuple):
    """The location of an archive: a folder or URL (None: next to the ledger), and options for the object store."""

    url: str | None = None
    options: Mapping[str, Any] = {}


def make_query(connection: sqlite3.Connection) -> Query:
    """Return a function that queries the ledger through ``connection``."""

    def query(sql: str, values: tuple[Any, ...]) -> list[Any]:
        return connection.execute(sql, values).fetchall()

    return query


def read_location(query: Query) -> Location:
    """Return the archive's location as recorded in the ledger."""
    found = query("SELECT value FROM about WHERE name = 'archive'", ())
    return Location(**json.loads(found[0][0])) if found else Location()


def open_archive_store(query: Query, folder: Path) -> BlobStore:
    """Open the store of the archive that belongs to the ledger in ``folder``; raises as ``open_store_at`` does."""
    return open_store_at(read_location(query), folder)


def open_store_at(location: Location, folder: Path) -> BlobStore:
    """Open the store at a location; a relative path starts at ``folder``.

    Raises:
        ValueError: if the URL or an option is unknown.
        ImportError: if the location is an object store and obstore is not installed.
    """
    url, options = location
    if url is None:
        return open_store(str(folder / ARCHIVE_FOLDER), {})
    return open_store(url if is_url(url) else str(folder / url), options)


def record_location(writer: sqlite3.Connection, location: Location) -> None:
    """Record the archive's location in the ledger.

    Raises:
        ArchiveMoved: if the ledger already has segments, and they lie at another location.
    """
    query = make_query(writer)
    before = read_location(query)
    if before.url != location.url and query("SELECT 1 FROM segments LIMIT 1", ()):
        raise ArchiveMoved(
            f"[history] archive is {_describe(location)}, but rounds of this history lie in {_describe(before)}: "
            "restore the former setting"
        )
    said = json.dumps({"url": location.url, "options": dict(location.options)})
    writer.execute("INSERT OR REPLACE INTO about VALUES ('archive', ?)", (said,))


def _describe(location: Location) -> str:
    return f"the folder {ARCHIVE_FOLDER!r} next to the ledger" if location.url is None else repr(location.url)


def find_segment(query: Query, round: int) -> str | None:
    """Return the name of the segment that contains a round, None if the round is not sealed."""
    found = query(
        "SELECT name FROM segments WHERE first <= ? AND last >= ? ORDER BY first DESC LIMIT 1", (round, round)
    )
    return str(found[0][0]) if found else None


def is_discarded(query: Query, round: int) -> bool:
    """Return whether retention has discarded a round, so that its task may have been deleted."""
    return bool(query(f"SELECT 1 WHERE ? < {LAST_DECISION} AND ? NOT IN held", (round, round)))


def has_erasures(query: Query) -> bool:
    """Return whether entities were erased from this history."""
    return has_table(query, "erasures")


def is_forgotten(query: Query, round: int) -> bool:
    """Return whether the task of a round was erased with its entity."""
    return has_erasures(query) and bool(query("SELECT 1 FROM forgotten WHERE round = ?", (round,)))


def list_forgotten(query: Query) -> list[int]:
    """Return the rounds whose tasks were erased with their entities, in ascending order."""
    found = query("SELECT round FROM forgotten ORDER BY round", ()) if has_erasures(query) else []
    return [round for (round,) in found]


def read_forgotten_ids(query: Query) -> dict[str, frozenset[str]]:
    """Return the digests of the ids of erased tasks by the salt of the digests."""
    found: dict[str, frozenset[str]] = {}
    for salt, ids in query("SELECT salt, ids FROM erasures", ()) if has_erasures(query) else ():
        found[salt] = found.get(salt, frozenset()) | frozenset(json.loads(ids))
    return found


def first_unsealed(query: Query) -> int:
    """Return the round at which sealing continues; all earlier rounds are sealed, discarded or damaged."""
    return int(query("SELECT coalesce(max(last) + 1, 0) FROM segments", ())[0][0])


def list_segments(query: Query) -> list[str]:
    """Return the names of the segments in the ledger, ordered by their first rounds."""
    return [str(name) for (name,) in query("SELECT name FROM segments ORDER BY first", ())]


def is_redundant(query: Query, marker: Marker) -> bool:
    """Return whether an unrecorded segment can be deleted: no round in it is the only copy of one that is needed."""
    elsewhere = """EXISTS (SELECT 1 FROM payloads WHERE payloads.round = rounds.round)
        OR EXISTS (SELECT 1 FROM segments WHERE rounds.round BETWEEN first AND last)"""
    sql = f"""SELECT 1 FROM rounds WHERE round BETWEEN ? AND ? AND NOT ({elsewhere}) AND length(digest) > 0
        AND (round >= {LAST_DECISION} OR round IN held OR round IN (SELECT round FROM thinned)) LIMIT 1"""
    return not query(sql, (marker.first, marker.last))


def record_segments(writer: sqlite3.Connection, markers: Sequence[Marker], instead_of: Sequence[str] = ()) -> None:
    """Record published segments, replacing those named by ``instead_of``; call it within a ``transaction``."""
    writer.executemany("DELETE FROM segments WHERE name = ?", [(name,) for name in instead_of])
    values = [(marker.first, marker.last, marker.name, marker.count, marker.bytes) for marker in markers]
    writer.executemany("INSERT INTO segments (first, last, name, count, bytes) VALUES (?, ?, ?, ?, ?)", values)


def drop_payloads(borrow_writer: Callable[[], Any], rounds: Sequence[int]) -> None:
    """Delete payloads from the ledger in batches and release their space.

    Args:
        borrow_writer: returns a context manager that lends the writer's connection, such as ``History.borrow_writer``.
        rounds: the rounds whose payloads are deleted; each payload is in the archive or was discarded.
    """
    for first in range(0, len(rounds), _BATCH_ROUNDS):
        batch = [(round,) for round in rounds[first : first + _BATCH_ROUNDS]]
        with borrow_writer() as writer:
            with transaction(writer):
                writer.executemany("DELETE FROM payloads WHERE round = ?", batch)
            writer.executescript("PRAGMA incremental_vacuum")  # ``execute`` would free only one page


def ledger_bytes(query: Query) -> int:
    """Return the number of bytes in use in the ledger's file."""
    pages, free, size = (
        int(query(f"PRAGMA {name}", ())[0][0]) for name in ("page_count", "freelist_count", "page_size")
    )
    return (pages - free) * size
