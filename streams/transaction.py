"""The one transaction that writes rounds: payload, id, source position and round number together."""

import contextlib
import sqlite3
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import google_crc32c

from streams.arrivals import Conflict, Receipt, Record

_STATEMENT_ROWS = 64
"""How many records one statement takes."""


class RoundEntry(NamedTuple):
    """What is known of a round without its payload; ``arrived`` in unix seconds, ``crc`` the payload's crc32c."""

    round: int
    id: str
    source: str
    digest: bytes
    crc: int
    arrived: float
    cursor: str | None


_INTO_ROUNDS = f"INSERT INTO rounds ({', '.join((*RoundEntry._fields, 'bytes'))})"


def commit(writer: sqlite3.Connection, records: Sequence[Record]) -> list[Receipt | Conflict]:
    """Make all records durable, or none; returns an answer for each, in order.

    A record whose id is known, be it from earlier in the same transaction, adds no round; rounds are dense.

    Raises:
        sqlite3.Error: if the database cannot be written; nothing is kept then.
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
    """Make all that is written in the block durable at its end, or nothing if it raises."""
    writer.execute("BEGIN IMMEDIATE")
    try:
        yield
        writer.execute("COMMIT")
    except BaseException:
        with contextlib.suppress(sqlite3.Error):
            writer.execute("ROLLBACK")  # a full disk may have rolled back by itself
        raise


def _known(writer: sqlite3.Connection, records: Sequence[Record]) -> dict[str, tuple[int, bytes]]:
    """Return the round and the digest of each id that is there already."""
    sql = f"SELECT id, round, digest FROM rounds WHERE id IN ({', '.join('?' * len(records))})"
    found = writer.execute(sql, [record.id for record in records]).fetchall()
    return {id: (round, digest) for id, round, digest in found}


def _assign_rounds(
    records: Sequence[Record], known: dict[str, tuple[int, bytes]], next_round: int
) -> list[Receipt | Conflict]:
    """Return the answer to each record, and add to what is ``known``."""
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


def insert_entry(writer: sqlite3.Connection, entry: RoundEntry, size: int) -> None:
    """Insert what is known of a round whose payload has ``size`` bytes; it belongs to a ``transaction``."""
    _insert_many(writer, _INTO_ROUNDS, [(*entry, size)])


def _insert_many(writer: sqlite3.Connection, into: str, rows: Sequence[tuple[Any, ...]]) -> None:
    """Insert rows by one statement: after each, this thread waits until the others let it run again."""
    row = f"({', '.join('?' * len(rows[0]))})"
    writer.execute(f"{into} VALUES {', '.join([row] * len(rows))}", [value for values in rows for value in values])
