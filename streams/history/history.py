"""Store every accepted task durably and exactly once, under consecutive round numbers."""

import contextlib
import json
import math
import os
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, lru_cache
from itertools import groupby
from operator import index
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import google_crc32c
import numpy as np
import torch

from online_meta.types import Task
from streams.entities import digest_of, find_entity
from streams.formats.wire import decode_payload, gather_batch
from streams.history import archive_index, errors, ledger
from streams.history.archive.archive import Archive
from streams.history.archive_index import Query, find_segment
from streams.history.errors import HistoryDamaged, HistoryError
from streams.history.ledger import (
    MAX_WAL_BYTES,
    WAL_BACKGROUND_BYTES,
    WAL_BACKGROUND_PAGES,
    RoundEntry,
    commit,
    truncate_wal,
    wal_size,
)
from streams.types import Conflict, Receipt, Record, Scales

_BATCH_ROUNDS = 64


_DTYPES = {"U8": "<u1", "F16": "<f2", "F32": "<f4", "F64": "<f8", "I64": "<i8"}


class _TensorLayout(NamedTuple):
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    start: int
    size: int


def read_payloads(
    query: Query, archive: Callable[[], Archive], read: Callable[[int], bytes], rounds: Sequence[int]
) -> list[bytes]:
    """Return the payloads of many rounds, in the order of ``rounds``, after checking their checksums.

    Args:
        query: runs an SQL statement on the ledger.
        archive: returns the archive, which holds the payloads that the ledger no longer has.
        read: reads a single round that the batched reads did not return intact, or raises the error.
        rounds: round numbers, in any order.
    """
    found: dict[int, bytes] = {}
    for first in range(0, len(rounds), _BATCH_ROUNDS):
        batch = rounds[first : first + _BATCH_ROUNDS]
        sql = "SELECT round, crc, payload FROM rounds LEFT JOIN payloads USING (round) WHERE round IN "
        try:
            rows = query(f"{sql} ({', '.join('?' * len(batch))})", tuple(batch))
        except HistoryDamaged:  # reading the rounds one by one finds the damaged one
            continue
        archived = sorted(round for round, _, kept in rows if kept is None)
        from_archive = _read_archived(query, archive(), archived) if archived else {}
        candidates = ((round, crc, from_archive.get(round) if kept is None else kept) for round, crc, kept in rows)
        found |= {
            round: kept for round, crc, kept in candidates if kept is not None and google_crc32c.value(kept) == crc
        }
    return [found[round] if round in found else read(round) for round in rounds]


def _read_archived(query: Query, archive: Archive, rounds: Sequence[int]) -> dict[int, bytes]:
    """Return payloads by round, reading each segment once; rounds that cannot be read are left out."""
    found: dict[int, bytes] = {}
    for name, in_segment in groupby(rounds, lambda round: find_segment(query, round)):
        batch = [*in_segment]
        if name is not None:
            with contextlib.suppress(HistoryError, OSError):  # reading the rounds one by one reports the error
                found |= zip(batch, archive.payloads(name, batch), strict=True)
    return found


def decode_view(payload: bytes) -> Task:
    """Decode a payload that ``encode`` wrote, twice as fast as ``decode_payload``.

    The tensors of the task share one buffer. They start at multiples of 64 bytes, as ``copy_aligned`` explains.

    Raises:
        ValueError: if ``encode`` did not write the payload.
    """
    after = 8 + int.from_bytes(payload[:8], "little")
    layouts = _read_layouts(payload[:after], len(payload))
    buffer = np.empty(len(payload) + _ALIGNMENT * (len(layouts) + 1), np.uint8)
    place = -buffer.__array_interface__["data"][0] % _ALIGNMENT
    values = {}
    for name, (shape, dtype, start, size) in layouts:
        value = np.ndarray(shape, dtype, buffer, place)
        value[...] = np.ndarray(shape, dtype, payload, start)
        values[name] = torch.from_numpy(value)
        place += size + -size % _ALIGNMENT
    return Task(gather_batch(values, "support"), gather_batch(values, "query"))


def stack_views(payloads: Sequence[bytes]) -> list[tuple[list[int], Task]]:
    """Decode payloads that ``encode`` wrote, as stacked tensors: a task takes a tenth of the time of ``decode_view``.

    Returns:
        For each kind of task, which payloads are of this kind, and their tensors, stacked along a new first dimension.

    Raises:
        ValueError: if ``encode`` did not write one of them.
    """
    kinds: dict[tuple[bytes, int], list[int]] = {}
    for at, payload in enumerate(payloads):
        kinds.setdefault((payload[: 8 + int.from_bytes(payload[:8], "little")], len(payload)), []).append(at)
    found = []
    for (head, length), chosen in kinds.items():
        layouts = _read_layouts(head, length)
        joined = np.frombuffer(b"".join(payloads[at] for at in chosen), np.uint8).reshape(len(chosen), length)
        values = {}
        for name, (shape, dtype, start, size) in layouts:
            part = np.empty((len(chosen), size), np.uint8)
            part[...] = joined[:, start : start + size]
            values[name] = torch.from_numpy(part.view(dtype).reshape(len(chosen), *shape))
        found.append((chosen, Task(gather_batch(values, "support"), gather_batch(values, "query"))))
    return found


@lru_cache(maxsize=1024)
def _read_layouts(head: bytes, length: int) -> tuple[tuple[str, _TensorLayout], ...]:
    """Return where each tensor lies in a payload of ``length`` bytes with this header, by name."""
    decode_payload(head + bytes(max(length - len(head), 0)))  # the library validates the header
    header = json.loads(head[8:])
    layouts = []
    for name in sorted(header.keys() - {"__metadata__"}):
        shape, dtype = tuple(header[name]["shape"]), np.dtype(_DTYPES[header[name]["dtype"]])
        start, end = header[name]["data_offsets"]
        assert end - start == math.prod(shape) * dtype.itemsize
        layouts.append((name, _TensorLayout(shape, dtype, len(head) + start, end - start)))
    return tuple(layouts)


_ALIGNMENT = 64

MIN_YIELD_SECONDS = 0.01
"""How long a background writer pauses between two transactions, at least."""


class History:
    """The durable history in a folder, with one writer and any number of reader processes and threads.

    Readers need no lock, see each commit immediately and never wait for the writer's disk. While one process appends,
    one other process may do maintenance (sealing and retention). A forked process must open the history again.
    ``history[t]`` is the task of round t, and ``len(history)`` the number of committed rounds.
    """

    def __init__(
        self, path: Path, writer: sqlite3.Connection | None, lock: int | None, *, can_append: bool = True
    ) -> None:
        """Take ownership of open connections; call ``History.open`` instead."""
        self.path = path
        self._file = path / ledger.FILE
        self._writer = writer
        self._lock = lock
        self._writer_lock = threading.Lock()
        self._idle_readers: deque[sqlite3.Connection] = deque()
        self._closed = threading.Event()
        self._can_append = can_append
        self._wal_limit = MAX_WAL_BYTES if can_append else WAL_BACKGROUND_BYTES

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, write: bool) -> Self:
        """Open the history in the folder ``path``; a writer creates it if it does not exist.

        Args:
            path: the folder of the history.
            write: whether to open it for appending; there can be only one such writer.

        Raises:
            HistoryMissing: if a reader finds no history.
            HistoryBusy: if another writer has it open, or the maintenance process of a dead writer still runs.
            HistoryFormatError: if the file is not a history of a supported format; it is left unchanged.
            HistoryFull: if there is no space to create it.
        """
        folder = Path(path)
        file = folder / ledger.FILE
        if file.exists() or not write:
            ledger.connect(file, write=False).close()
        if not write:
            return cls(folder, None, None)
        ledger.make_folder(folder)
        lock = ledger.acquire_lock(folder)
        try:
            ledger.wait_for_maintenance(folder)
            if not file.exists():
                ledger.create(file)
            with ledger.translate_errors(file):
                return cls(folder, ledger.connect(file, write=True), lock)
        except BaseException:
            os.close(lock)
            raise

    @classmethod
    def open_for_maintenance(cls, path: str | os.PathLike[str]) -> Self:
        """Open a history that another process appends to, for sealing and retention.

        The appending process has priority: this one pauses after each of its own transactions.

        Raises:
            HistoryMissing: if there is no history.
            HistoryBusy: if another process is already doing maintenance.
            HistoryFormatError: if the file is not a history of a supported format.
        """
        folder = Path(path)
        ledger.connect(folder / ledger.FILE, write=False).close()
        lock = ledger.acquire_lock(folder, ledger.MAINTENANCE_LOCK, ledger.EXIT_GRACE_SECONDS)
        try:
            writer = ledger.connect(folder / ledger.FILE, write=True)
            writer.execute(f"PRAGMA wal_autocheckpoint={WAL_BACKGROUND_PAGES}").fetchall()
            return cls(folder, writer, lock, can_append=False)
        except BaseException:
            os.close(lock)
            raise

    def append(self, records: Sequence[Record]) -> list[Receipt | Conflict]:
        """Commit the records durably in one transaction: all of them or, if this raises, none.

        A record whose id is known is a duplicate if the digests are equal, and a conflict otherwise. In both cases its
        source's cursor advances, so that the source does not deliver it again.

        Args:
            records: the tasks to append.

        Returns:
            A receipt or a conflict for each record, in order.

        Raises:
            HistoryFull: if the disk is full.
            ValueError: if this History is closed, or was not opened for appending.
        """
        if not self._can_append:
            raise ValueError(f"{self.path}: this History cannot append: it was opened for maintenance")
        with self.borrow_writer() as writer:
            return commit(writer, records) if records else []

    @contextlib.contextmanager
    def borrow_writer(self) -> Iterator[sqlite3.Connection]:
        """Lend the writer's connection, to one thread at a time; raises as ``append`` does."""
        with self._writer_lock:
            if self._writer is None:
                raise ValueError(
                    f"{self.path}: this History cannot append: it is closed or was opened with write=False"
                )
            began = time.monotonic()
            with ledger.translate_errors(self._file):
                yield self._writer
            self._wal_limit = truncate_wal(self._writer, self._file, self._wal_limit)
            if (
                not self._can_append
            ):  # SQLite's lock has no queue: a background writer that released it only briefly would get it again.
                time.sleep(max(MIN_YIELD_SECONDS, time.monotonic() - began))

    def remember(self, round: int, task: Task) -> None:
        """Do nothing: a durable history already has the task of every round."""

    def __len__(self) -> int:
        """Return the number of committed rounds."""
        return int(self.query("SELECT coalesce(max(round) + 1, 0) FROM rounds")[0][0])

    def __getitem__(self, round: int, /) -> Task:
        """Return the task of a round.

        Raises:
            IndexError: if the round is not committed.
            HistoryDamaged: if it cannot be read back as written.
        """
        payload = self.payload(round)
        try:
            return decode_payload(payload)
        except ValueError as error:
            raise HistoryDamaged(f"{self._file}: round {round} cannot be decoded: {error}") from error

    def tasks(self, rounds: Sequence[int]) -> list[Task]:
        """Return the tasks of ``rounds``, in their order; one call for many rounds is much faster than single reads.

        The tensors of a task share memory. Raises as ``history[t]`` does.
        """
        found = []
        for round, payload in zip(rounds, self.payloads(rounds), strict=True):
            try:
                found.append(decode_view(payload))
            except ValueError as error:
                raise HistoryDamaged(f"{self._file}: round {round} cannot be decoded: {error}") from error
        return found

    def stacks(self, rounds: Sequence[int]) -> list[tuple[list[int], Task]]:
        """Return the tasks of ``rounds`` as stacked tensors: for each kind of task, its rounds and their tasks.

        Raises as ``history[t]`` does.
        """
        try:
            found = stack_views(self.payloads(rounds))
        except ValueError:
            self.tasks(rounds)  # Its error names the round.
            raise
        return [([rounds[at] for at in chosen], tasks) for chosen, tasks in found]

    def payloads(self, rounds: Sequence[int]) -> list[bytes]:
        """Return the payloads of ``rounds``, in their order; raises as ``payload`` does."""
        return read_payloads(self.query, lambda: self.archive, self.payload, [index(round) for round in rounds])

    def payload(self, round: int) -> bytes:
        """Return the bytes of a round as ``wire.encode`` wrote them, after checking their checksum.

        Raises:
            IndexError: if the round is not committed.
            RoundDiscarded: if retention has discarded the round.
            HistoryDamaged: if the bytes are missing or differ from what was written; the message names the round.
            ArchiveUnreachable: if the bytes are in an archive that cannot be reached.
        """
        sql = "SELECT crc, payload FROM rounds LEFT JOIN payloads USING (round) WHERE round = ?"
        try:
            found = self.query(sql, (index(round),))  # SQLite does not accept NumPy integers
            if not found:
                raise IndexError(f"round {round} is not among the {len(self)} rounds of {self._file}")
            crc, kept = found[0]
            payload: bytes = self._read_sealed(index(round)) if kept is None else kept
        except HistoryDamaged as error:
            raise HistoryDamaged(f"{self._file}: round {round}: {error}") from error
        if google_crc32c.value(payload) != crc:
            raise HistoryDamaged(f"{self._file}: round {round} is not what was written (crc32c differs)")
        return payload

    def _read_sealed(self, round: int) -> bytes:
        """Return a payload that the ledger no longer has."""
        if archive_index.is_forgotten(self.query, round):
            raise errors.RoundForgotten(f"round {round} is gone: its task was erased with its entity")
        name = archive_index.find_segment(self.query, round)
        try:
            if name is None:
                raise HistoryDamaged("its payload is lost")
            return self.archive.payload(name, round)
        except HistoryDamaged:
            if archive_index.is_discarded(self.query, round):
                raise errors.RoundDiscarded(f"round {round} is gone: retention has discarded it") from None
            now = archive_index.find_segment(self.query, round)
            if now in (None, name):
                raise
            return self.archive.payload(str(now), round)  # The round has just been moved to another segment.

    def find(self, id: str) -> int | None:
        """Return the round of a task id, None if the id is unknown."""
        found = self.query("SELECT round FROM rounds WHERE id = ?", (id,))
        return int(found[0][0]) if found else None

    def entry(self, round: int) -> RoundEntry:
        """Return the metadata of a round.

        Raises:
            IndexError: if the round is not committed.
        """
        columns = ", ".join(RoundEntry._fields)
        found = self.query(f"SELECT {columns} FROM rounds WHERE round = ?", (index(round),))
        if not found:
            raise IndexError(f"round {round} is not among the {len(self)} rounds of {self._file}")
        return RoundEntry(*found[0])

    def newest_task(self) -> Task | None:
        """Return the task of the newest round that was not erased; None if there is none."""
        found = self.query("SELECT max(round) FROM rounds WHERE length(digest) > 0")[0][0]  # erased ones have none
        return None if found is None else self[found]

    def is_forgotten(self, id: str) -> bool:
        """Return whether a task of this id was erased with its entity, as of the time when this History was opened."""
        if not self._forgotten_ids or find_entity(id) is None:
            return False
        return any(digest_of(salt, id) in ids for salt, ids in self._forgotten_ids.items())

    @cached_property
    def _forgotten_ids(self) -> dict[str, frozenset[str]]:
        return archive_index.read_forgotten_ids(self.query)

    def cursor(self, source: str) -> str | None:
        """Return the position after the last committed task of a source, None if the source has none."""
        found = self.query("SELECT cursor FROM cursors WHERE source = ?", (source,))
        return str(found[0][0]) if found else None

    def scales(self, source: str, count: int) -> list[Scales]:
        """Return the scales of the newest ``count`` rounds of a source that were committed with any, oldest first."""
        return ledger.read_scales(self.query, source, count)

    def size_bytes(self) -> int:
        """Return the total size of the database, its write-ahead log and the archive, in bytes."""
        archived = int(self.query("SELECT coalesce(sum(bytes), 0) FROM segments")[0][0])
        return self._file.stat().st_size + wal_size(self._file) + archived

    def close(self) -> None:
        """Close all connections and release the writer's lock; a second call does nothing."""
        with self._writer_lock:
            self._closed.set()
            while self._idle_readers:
                self._idle_readers.pop().close()
            if self._writer is not None:
                self._writer.close()
                self._writer = None
            if self._lock is not None:
                os.close(self._lock)
                self._lock = None

    def __enter__(self) -> Self:
        """Return this history; the end of the block closes it."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Close the history."""
        self.close()

    def query(self, sql: str, values: tuple[Any, ...] = ()) -> list[Any]:
        """Run an SQL query on the ledger as of the last commit and return all rows."""
        with ledger.translate_errors(self._file), self._reader() as reader:
            return reader.execute(sql, values).fetchall()  # fetch all: an open cursor would keep the WAL from shrinking

    @cached_property
    def archive(self) -> Archive:
        """The archive of sealed rounds, at the location recorded in the ledger."""
        return Archive(archive_index.open_archive_store(self.query, self.path))

    @contextlib.contextmanager
    def _reader(self) -> Iterator[sqlite3.Connection]:
        """Lend a read connection to one thread; there is one connection per concurrent reader."""
        if self._closed.is_set():
            raise ValueError(f"{self.path}: this History is closed")
        try:
            reader = self._idle_readers.pop()
        except IndexError:
            reader = ledger.connect(self._file, write=False)
        try:
            yield reader
        except BaseException:
            reader.close()
            raise
        self._idle_readers.append(reader)
        if self._closed.is_set():
            with contextlib.suppress(IndexError):
                self._idle_readers.pop().close()
