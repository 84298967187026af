"""The one transaction that writes rounds: payload, id, source position and round number together."""

import contextlib
import sqlite3
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import google_crc32c

from streams.arrivals import Conflict, Receipt, Record


class Entry(NamedTuple):
    """What is known of a round without its payload; ``arrived`` in unix seconds, ``crc`` the payload's crc32c."""

    round: int
    id: str
    source: str
    digest: bytes
    crc: int
    arrived: float
    cursor: str | None


def commit(writer: sqlite3.Connection, records: Sequence[Record]) -> list[Receipt | Conflict]:
    """Make all records durable, or none; returns an answer for each, in order.

    A record whose id is known, be it from earlier in the same transaction, adds no round; rounds are dense.

    Raises:
        sqlite3.Error: if the database cannot be written; nothing is kept then.
    """
    with transaction(writer):
        next_round = int(writer.execute("SELECT coalesce(max(round) + 1, 0) FROM rounds").fetchall()[0][0])
        answers: list[Receipt | Conflict] = []
        for record in records:
            answer = _known(writer, record) or _insert(writer, record, next_round)
            next_round += isinstance(answer, Receipt) and not answer.duplicate
            answers.append(answer)
        cursors = {record.source: record.cursor for record in records if record.cursor is not None}
        writer.executemany("INSERT OR REPLACE INTO cursors VALUES (?, ?)", cursors.items())
    return answers


@contextlib.contextmanager
def transaction(writer: sqlite3.Connection) -> Iterator[None]:
    """Make all that is written in the block durable at its end, or nothing if it raises."""
    writer.execute("BEGIN IMMEDIATE")
    try:
        yield
        writer.execute("COMMIT")
    except BaseException:
        with contextlib.suppress(sqlite3.Error):
            writer.execute("ROLLBACK")  # a full disk may have rolled back by itself
        raise


def _known(writer: sqlite3.Connection, record: Record) -> Receipt | Conflict | None:
    found = writer.execute("SELECT round, digest FROM rounds WHERE id = ?", (record.id,)).fetchall()
    if not found:
        return None
    round, digest = found[0]
    return Receipt(record.id, round, duplicate=True) if digest == record.digest else Conflict(record.id, round)


def _insert(writer: sqlite3.Connection, record: Record, round: int) -> Receipt:
    crc = google_crc32c.value(record.payload)
    entry = Entry(round, record.id, record.source, record.digest, crc, record.arrived, record.cursor)
    insert_entry(writer, entry, len(record.payload))
    writer.execute("INSERT INTO payloads VALUES (?, ?)", (round, record.payload))
    return Receipt(record.id, round, duplicate=False)


def insert_entry(writer: sqlite3.Connection, entry: Entry, size: int) -> None:
    """Insert what is known of a round whose payload has ``size`` bytes; it belongs to a ``transaction``."""
    names = (*Entry._fields, "bytes")
    writer.execute(f"INSERT INTO rounds ({', '.join(names)}) VALUES ({', '.join('?' * len(names))})", (*entry, size))
