"""Erase what a history holds of an entity, and keep a log of erasures that names no entity.

The log is written before anything is erased. It lies in the folder of the history, and a second time next to the folder
of the run, where restoring a backup of the run does not replace it. The ledger notes each erasure that is complete. One
that it has not noted, as in a backup that was made before, is applied again: the log has what recognises the tasks.
"""

import dataclasses
import json
import secrets
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streams.atomic_files import replace_file
from streams.entities import digest_of, find_entity
from streams.history import archive_index
from streams.history.entity_rounds import find_rounds
from streams.history.errors import HistoryBusy
from streams.history.history import History
from streams.history.ledger import transaction
from streams.history.observations import list_observed
from streams.history.predictions import list_predicted
from streams.history.sealing import remove_orphans
from streams.ingest.dead_letters import read_letters
from streams.types import ErasedEntity

LOG = "erasures.jsonl"
"""The name of the log in the folder of the history; next to the run's folder RUN, it is RUN.erasures.jsonl."""
_TABLES = """
CREATE TABLE IF NOT EXISTS erasures (  -- made with the first erasure
    digest    TEXT NOT NULL,           -- of the entity's key
    timestamp REAL NOT NULL,           -- unix seconds
    salt      TEXT NOT NULL,
    ids       TEXT NOT NULL,           -- JSON: the digests of the tasks' ids
    complete  INTEGER NOT NULL,        -- 1 once nothing of the entity is left
    PRIMARY KEY (digest, timestamp)
);
CREATE TABLE IF NOT EXISTS forgotten (round INTEGER PRIMARY KEY, digest TEXT NOT NULL, timestamp REAL NOT NULL);
"""
_BLANK = "UPDATE rounds SET id = ?, digest = x'', crc = 0, cursor = NULL, bytes = 0 WHERE round = ?"


@dataclass(frozen=True)
class Erasure:
    """The erasure of an entity, as the log has it.

    Attributes:
        timestamp: Unix time in seconds.
        run: when the history was created, which tells it from other histories.
        salt: 32 hexadecimal digits, drawn at random.
        digest: the SHA-256 of the salt and the entity's key, in hexadecimal digits.
        rounds: the rounds whose tasks were erased.
        ids: the SHA-256 of the salt and each task's id: such a task is not accepted again.
        cursors: how far each source was read then: of the entity's rows up to there, nothing is used again.
    """

    timestamp: float
    run: str
    salt: str
    digest: str
    rounds: tuple[int, ...]
    ids: tuple[str, ...]
    cursors: dict[str, str]

    def names_key(self, key: str | None) -> bool:
        """Return whether this is the key of the entity."""
        return key is not None and digest_of(self.salt, key) == self.digest

    def names(self, id: str) -> bool:
        """Return whether the id of a task names the entity."""
        return self.names_key(find_entity(id))


def plan_erasure(history: History, key: str) -> Erasure:
    """Return the erasure of what the history has of an entity; nothing is logged or erased yet."""
    known = read_erasures(history)
    salt = known[0].salt if known else secrets.token_hex(16)
    rounds = tuple(find_rounds(history, key))
    ids = tuple(digest_of(salt, history.entry(round).id) for round in rounds)
    cursors = dict(history.query("SELECT source, cursor FROM cursors"))
    return Erasure(time.time(), _created(history), salt, digest_of(salt, key), rounds, ids, cursors)


def _created(history: History) -> str:
    return str(history.query("SELECT value FROM about WHERE name = 'created'")[0][0])


def list_erased(history: History, source: str) -> list[ErasedEntity]:
    """Return the erased entities, with the position up to which a source's rows of each were erased."""
    found = [(one, one.cursors.get(source)) for one in read_erasures(history)]
    return [ErasedEntity(one.names_key, cursor) for one, cursor in found if cursor is not None]


def list_logs(history_folder: Path) -> tuple[Path, Path]:
    """Return the paths of both logs of a history: in its folder, and next to the run's folder."""
    run = history_folder.resolve().parent
    return history_folder / LOG, run.with_name(f"{run.name}.{LOG}")


def read_erasures(history: History) -> list[Erasure]:
    """Return all erasures of a history that either log has, oldest first."""
    inside, outside = (_read_log(path) for path in list_logs(history.path))
    run = _created(history) if outside else ""
    found = {(one.digest, one.timestamp): one for one in [*(one for one in outside if one.run == run), *inside]}
    return sorted(found.values(), key=lambda one: one.timestamp)


def _read_log(path: Path) -> list[Erasure]:
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        return []
    return [_from_json(json.loads(line)) for line in lines]


def _from_json(line: dict[str, Any]) -> Erasure:
    values = {**line, "rounds": tuple(line["rounds"]), "ids": tuple(line["ids"])}
    return Erasure(**{item.name: values[item.name] for item in dataclasses.fields(Erasure)})


def count_erasures(history_folder: Path) -> int:
    """Return how many erasures the log in the folder of a history, or of a replay's files, has."""
    path = history_folder / LOG
    return len(path.read_bytes().splitlines()) if path.exists() else 0


def list_erased_rounds(history: History) -> list[tuple[int, ...]]:
    """Return the rounds that each erasure has erased from the ledger, in the order of the erasures."""
    if not archive_index.has_erasures(history.query):
        return []
    found: dict[tuple[str, float], list[int]] = {}
    for digest, timestamp, round in history.query("SELECT digest, timestamp, round FROM forgotten ORDER BY round"):
        found.setdefault((digest, timestamp), []).append(round)
    return [tuple(found.get((one.digest, one.timestamp), ())) for one in read_erasures(history)]


def log_erasures(history: History, erasures: Sequence[Erasure]) -> None:
    """Add erasures, durably, to the logs that lack them.

    Raises:
        OSError: if a log cannot be written.
    """
    for path in list_logs(history.path):
        known = _read_log(path)
        new = [one for one in erasures if one not in known]
        if new:
            lines = [json.dumps({"event": "forget", **dataclasses.asdict(one)}) + "\n" for one in [*known, *new]]
            replace_file(path, "".join(lines).encode(), durable=True)


def list_pending(history: History) -> list[Erasure]:
    """Return the erasures in the logs that the ledger has not noted as complete, oldest first."""
    erasures = read_erasures(history)
    if not erasures or not archive_index.has_erasures(history.query):
        return erasures
    done = {tuple(row) for row in history.query("SELECT digest, timestamp FROM erasures WHERE complete")}
    return [one for one in erasures if (one.digest, one.timestamp) not in done]


def erase_rounds(history: History, erasure: Erasure) -> list[int]:
    """Erase the entity's tasks from the ledger in one transaction, and return their rounds.

    The rounds keep their numbers, sources and times of arrival. Their ids no longer name the entity.
    """
    with history.borrow_writer() as writer:
        writer.execute("PRAGMA secure_delete=ON").fetchall()
        writer.executescript(_TABLES)
        with transaction(writer):
            known = writer.execute("SELECT round, id FROM rounds").fetchall()
            own = [round for round, id in known if erasure.names(id)]
            for round in own:
                writer.execute(_BLANK, (f"forgotten-{round}-{erasure.digest[:12]}", round))
                writer.execute("DELETE FROM payloads WHERE round = ?", (round,))
                writer.execute("INSERT INTO forgotten VALUES (?, ?, ?)", (round, erasure.digest, erasure.timestamp))
            for key in list_observed(history):
                if erasure.names_key(key):
                    writer.execute("DELETE FROM observations WHERE entity = ?", (key,))
            for key in list_predicted(history):
                if erasure.names_key(key):
                    writer.execute("DELETE FROM predictions WHERE entity = ?", (key,))
            if writer.execute("SELECT 1 FROM sqlite_master WHERE name = 'scales'").fetchall():
                writer.executemany("DELETE FROM scales WHERE round = ?", [(round,) for round in own])
            writer.execute(
                "INSERT OR IGNORE INTO erasures VALUES (?, ?, ?, ?, 0)",
                (erasure.digest, erasure.timestamp, erasure.salt, json.dumps(erasure.ids)),
            )
    found = history.query(
        "SELECT round FROM forgotten WHERE digest = ? AND timestamp = ? ORDER BY round",
        (erasure.digest, erasure.timestamp),
    )
    return [round for (round,) in found]


def erase_from_archive(history: History, rounds: Collection[int]) -> None:
    """Rewrite the segments of the archive that contain any of these rounds without them.

    Raises:
        HistoryDamaged: if such a segment cannot be read; it stays.
        ArchiveUnreachable: if the object store cannot be reached.
    """
    archive = history.archive
    for name, first, last in history.query("SELECT name, first, last FROM segments ORDER BY first"):
        if not any(first <= round <= last for round in rounds):
            continue
        stored = archive.read_all(name)
        kept = [one for one in stored if one.entry.round not in rounds]
        if len(kept) == len(stored):
            continue
        markers = [archive.publish(kept)] if kept else []
        with history.borrow_writer() as writer, transaction(writer):
            archive_index.record_segments(writer, markers, instead_of=[name])
        archive.discard(name)
    remove_orphans(history)


def rewrite_ledger(history: History) -> None:
    """Rewrite the ledger's file without free pages, and empty its write-ahead log.

    Raises:
        HistoryBusy: if another process reads the history meanwhile.
        HistoryFull: if there is no space for a second copy of the ledger.
    """
    with history.borrow_writer() as writer:
        writer.execute("VACUUM")
        busy = writer.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()[0][0]
    if busy:
        raise HistoryBusy(f"{history.path} is read by another process: end it, and forget again")


def erase_letters(folder: Path, erasure: Erasure) -> None:
    """Remove the entity's dead letters, and letters that a killed process has not finished."""
    for body, letter in [*read_letters(folder)]:
        if erasure.names(letter["id"]):
            body.with_suffix(".json").unlink(missing_ok=True)
            body.unlink(missing_ok=True)
    for unfinished in [*folder.glob("*.json.new")]:
        unfinished.unlink()
    for body in [*folder.glob("*.body")]:
        if not body.with_suffix(".json").exists():
            body.unlink()


def note_complete(history: History, erasure: Erasure) -> None:
    """Note, durably, that nothing of the entity is left."""
    with history.borrow_writer() as writer, transaction(writer):
        writer.execute(
            "UPDATE erasures SET complete = 1 WHERE digest = ? AND timestamp = ?", (erasure.digest, erasure.timestamp)
        )
