"""Keep predictions in the ledger until their labels come, and say how the stored answers were scored.

A prediction is durable once it is kept, and so are its labels once they are noted. Its rows become the round with the
prediction's id; then its body is removed, and what is left recognises labels that are sent again.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from streams.entities import find_entity
from streams.history.history import History
from streams.history.ledger import has_table, transaction

_TABLE = """
CREATE TABLE IF NOT EXISTS predictions (  -- made with the first prediction that is kept
    id      TEXT PRIMARY KEY,   -- of the task that the rows become
    entity  TEXT NOT NULL,
    made    REAL NOT NULL,      -- unix seconds
    leader  INTEGER NOT NULL,   -- the rounds that the leader had learned
    rows    INTEGER NOT NULL,
    seen    INTEGER NOT NULL,   -- rows of the support set
    targets TEXT,               -- JSON: how the labels are encoded; NULL for numbers that stay as they are
    about   TEXT NOT NULL,      -- JSON: what the outputs say about a target
    bytes   INTEGER NOT NULL,   -- of the body
    body    BLOB,               -- safetensors: inputs, support set and outputs; NULL once a round has the rows
    labels  BLOB,               -- the SHA-256 of the labels; NULL until they come
    loss    REAL                -- of the stored answer; NULL without labels, or if it is not finite
);
CREATE INDEX IF NOT EXISTS kept_predictions ON predictions (made, bytes) WHERE body IS NOT NULL;
CREATE INDEX IF NOT EXISTS predictions_by_entity ON predictions (entity);
"""
DAY_SECONDS = 86400.0


class Kept(NamedTuple):
    """A prediction to keep, or one that is kept.

    Attributes:
        id: of the task that its rows become once the labels are known.
        entity: the key of the entity.
        leader: the number of rounds that the leader had learned which answered.
        rows: how many rows it is for.
        seen: how many known rows of the entity were its support set.
        targets: how their labels are encoded, as JSON; None for numbers that stay as they are.
        about: what the outputs say about a target, as JSON.
        body: the inputs, the support set and the outputs as safetensors; None once a round has the rows.
        labels: the SHA-256 of the labels; None until they come.
        loss: of the stored answer; None without labels, or if it is not finite.
    """

    id: str
    entity: str
    leader: int
    rows: int
    seen: int
    targets: str | None
    about: str
    body: bytes | None
    labels: bytes | None = None
    loss: float | None = None


class Room(NamedTuple):
    """How many predictions may wait for their labels, how many bytes they may have, and for how many days."""

    predictions: int
    bytes: int
    days: int


class PredictionsFull(Exception):
    """As many predictions wait for their labels as may be kept."""


def keep_prediction(history: History, kept: Kept, room: Room, now: float) -> None:
    """Keep a prediction durably, after those that wait for longer than ``room`` allows are dropped.

    Args:
        history: open for writing.
        kept: the prediction, with its body.
        room: bounds on those that wait for their labels.
        now: Unix time in seconds.

    Raises:
        PredictionsFull: if there is no room for it.
    """
    assert kept.body is not None
    with history.borrow_writer() as writer:
        writer.executescript(_TABLE)
        with transaction(writer):
            late = "DELETE FROM predictions WHERE body IS NOT NULL AND made < ?"
            writer.execute(late, (now - room.days * DAY_SECONDS,))
            waiting = "SELECT count(*), coalesce(sum(bytes), 0) FROM predictions WHERE body IS NOT NULL"
            ((count, size),) = writer.execute(waiting).fetchall()
            if count >= room.predictions or size + len(kept.body) > room.bytes:
                raise PredictionsFull(
                    f"{count} predictions of {size} bytes wait for their labels, and at most {room.predictions} of "
                    f"{room.bytes} bytes are kept: send labels, or raise [serve.limits] kept_predictions and "
                    f"kept_prediction_bytes. A prediction is dropped after {room.days} days"
                )
            columns = ("made", "bytes", *Kept._fields)
            into = f"INSERT INTO predictions ({', '.join(columns)}) VALUES ({', '.join('?' * len(columns))})"
            writer.execute(into, (now, len(kept.body), *kept))


def find_prediction(history: History, id: str, entity: str) -> Kept | None:
    """Return the prediction of an entity that is or was kept under an id; None if there is none."""
    if not has_table(history.query, "predictions"):
        return None
    columns = ", ".join(Kept._fields)
    found = history.query(f"SELECT {columns} FROM predictions WHERE id = ? AND entity = ?", (id, entity))
    return Kept(*found[0]) if found else None


def note_labels(history: History, id: str, labels: bytes, loss: float | None) -> None:
    """Note, durably, the SHA-256 of the labels of a prediction, and the loss of the stored answer."""
    with history.borrow_writer() as writer, transaction(writer):
        writer.execute("UPDATE predictions SET labels = ?, loss = ? WHERE id = ?", (labels, loss, id))


def drop_prediction_body(history: History, id: str) -> None:
    """Remove the rows and the outputs of a prediction whose round the history has."""
    with history.borrow_writer() as writer, transaction(writer):
        writer.execute("UPDATE predictions SET body = NULL WHERE id = ?", (id,))


def find_predicted_rounds(history: History, rounds: Sequence[int]) -> set[int]:
    """Return those rounds whose support set are rows that the entity had before, in a task or waiting for one."""
    if not rounds or not has_table(history.query, "predictions"):
        return set()
    sql = "SELECT round FROM predictions JOIN rounds USING (id) WHERE seen > 0 AND round BETWEEN ? AND ?"
    return {round for (round,) in history.query(sql, (min(rounds), max(rounds)))} & set(rounds)


def count_unlabelled(history: History, entity: str) -> int:
    """Return how many predictions of an entity wait for their labels."""
    if not has_table(history.query, "predictions"):
        return 0
    sql = "SELECT count(*) FROM predictions WHERE entity = ? AND body IS NOT NULL"
    return int(history.query(sql, (entity,))[0][0])


def list_predicted(history: History) -> list[str]:
    """Return the keys of all entities of which a prediction was ever kept."""
    if not has_table(history.query, "predictions"):
        return []
    return [key for (key,) in history.query("SELECT DISTINCT entity FROM predictions")]


def read_stored_answer(history: History, id: str) -> dict[str, Any]:
    """Return what the record of a round says of the stored answer to its task; {} if there is none.

    It is ``stored_answer``, with the ``loss`` of the stored answer, None if it is not finite, and ``leader``, the
    number of rounds that the leader had learned which gave it.
    """
    if find_entity(id) is None or not has_table(history.query, "predictions"):
        return {}
    found = history.query("SELECT loss, leader FROM predictions WHERE id = ?", (id,))
    return {"stored_answer": dict(zip(("loss", "leader"), found[0], strict=True))} if found else {}
