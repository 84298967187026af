"""Functions for the processes that the crash tests kill: they append records and report what was acknowledged."""

import functools
import os
import random
import signal
import sqlite3
from multiprocessing.connection import Connection

from streams.formats.wire import digest
from streams.history.history import History
from streams.types import Record


def payload(seed: int, number: int) -> bytes:
    """Return between 100 B and 60 kB that are a function of the task alone."""
    chance = random.Random(f"{seed}-{number}")
    return chance.randbytes(chance.choice((100, 5_000, 60_000)))


def record(seed: int, number: int) -> Record:
    body = payload(seed, number)
    return Record(f"t-{seed}-{number}", body, digest(body), "s", str(number), 0.0)


def append_forever(folder: str, seed: int, connection: Connection) -> None:
    """Append batches of 1 to 9 new records, with occasional duplicates, and send each receipt."""
    chance = random.Random(seed)
    number = 0
    with History.open(folder, write=True) as history:
        while True:
            size = chance.randint(1, 9)
            batch = [record(seed, n) for n in range(max(0, number - chance.randint(0, 2)), number + size)]
            number += size
            connection.send([tuple(answer) for answer in history.append(batch)])


class _Dying(sqlite3.Connection):
    """A connection that kills its process just before or after the n-th statement that begins with a word."""

    word, count, after = "", 0, False

    def execute(self, statement: str, *values: object) -> sqlite3.Cursor:
        hit = bool(self.word) and statement.startswith(self.word)
        if hit:
            self.count -= 1
        if hit and self.count == 0 and not self.after:
            os.kill(os.getpid(), signal.SIGKILL)
        cursor = super().execute(statement, *values)
        if hit and self.count == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return cursor


def die_at(folder: str, word: str, count: int, after: bool, connection: Connection) -> None:
    """Append 5 records, send their receipts, and die at the given point of appending 4 more."""
    sqlite3.connect = functools.partial(sqlite3.connect, factory=_Dying)  # type: ignore[assignment]
    history = History.open(folder, write=True)
    connection.send([tuple(answer) for answer in history.append([record(0, n) for n in range(5)])])
    writer = history._writer
    assert isinstance(writer, _Dying)
    writer.word, writer.count, writer.after = word, count, after
    history.append([record(0, n) for n in range(3, 9)])
    connection.send("survived")
