"""Keep rows of entities that are in no task yet, in the ledger; each request's rows are durable at once."""

from collections.abc import Sequence
from typing import NamedTuple

from safetensors.torch import load, save

from online_meta.batches import concat_batches
from online_meta.types import Batch
from streams.formats.wire import gather_batch, name_fields
from streams.history.history import History
from streams.history.ledger import has_table, transaction

_TABLE = """
CREATE TABLE IF NOT EXISTS observations (  -- made with the first row that is observed
    number  INTEGER PRIMARY KEY AUTOINCREMENT,
    entity  TEXT NOT NULL,
    request TEXT NOT NULL,                 -- what recognises a request that is sent again
    rows    INTEGER NOT NULL,
    body    BLOB,                          -- safetensors; NULL once a task has the rows
    task    TEXT,                          -- the id of the task that is made of them
    UNIQUE (entity, request)
)
"""


class Observation(NamedTuple):
    """The rows of one request: its number, how many they are, their bytes, and the id of their task, if it is made."""

    number: int
    rows: int
    body: bytes
    task: str | None

    def read(self) -> Batch:
        """Return the rows."""
        return gather_batch(load(self.body), "rows")


def keep_rows(history: History, entity: str, request: str, rows: Batch, count: int) -> bool:
    """Keep the rows of a request durably; return False, and change nothing, if the request is known."""
    body = save({name: tensor.contiguous().clone() for name, tensor in name_fields("rows", rows).items()})
    with history.borrow_writer() as writer:
        writer.execute(_TABLE)
        with transaction(writer):
            known = "SELECT 1 FROM observations WHERE entity = ? AND request = ?"
            if writer.execute(known, (entity, request)).fetchall():
                return False
            into = "INSERT INTO observations (entity, request, rows, body) VALUES (?, ?, ?, ?)"
            writer.execute(into, (entity, request, count, body))
    return True


def list_observed(history: History) -> list[str]:
    """Return the keys of all entities of which rows were ever observed."""
    if not has_table(history.query, "observations"):
        return []
    return [key for (key,) in history.query("SELECT DISTINCT entity FROM observations")]


def list_waiting(history: History, entity: str) -> list[Observation]:
    """Return what is observed of an entity and in no durable task, oldest first."""
    if not has_table(history.query, "observations"):
        return []
    sql = "SELECT number, rows, body, task FROM observations WHERE entity = ? AND body IS NOT NULL ORDER BY number"
    return [Observation(*found) for found in history.query(sql, (entity,))]


def assign_task(history: History, waiting: Sequence[Observation], id: str) -> None:
    """Note, durably, that observations become the task ``id``; it is submitted again until it is durable."""
    _update(history, "UPDATE observations SET task = ? WHERE number = ?", [(id, one.number) for one in waiting])


def drop_bodies(history: History, id: str) -> None:
    """Remove the rows of a task that the history has, or that was refused for good."""
    _update(history, "UPDATE observations SET body = NULL WHERE task = ?", [(id,)])


def _update(history: History, sql: str, values: Sequence[tuple[object, ...]]) -> None:
    with history.borrow_writer() as writer, transaction(writer):
        writer.executemany(sql, values)


def join_rows(batches: Sequence[Batch]) -> Batch | None:
    """Return the rows of several batches as one; None for no batch."""
    found: Batch | None = None
    for batch in batches:
        found = batch if found is None else concat_batches(found, batch)
    return found
