"""Many arrivals, one commit: a queue, and the thread that makes what is in it durable and answers."""

import logging
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import NamedTuple

from streams.history.errors import HistoryDamaged, HistoryFull
from streams.history.history import History
from streams.types import BacklogFull, Conflict, IngestClosed, Receipt, Record

Answer = Receipt | Conflict

_STORAGE_ERRORS = (HistoryFull, HistoryDamaged, sqlite3.OperationalError, OSError)
"""What is the history's fault; any other error is put down to a record."""

PAUSE_SECONDS = 1.0
"""How long a history that could not be written is left alone before the next try."""

_log = logging.getLogger(__name__)


class _Pending(NamedTuple):
    record: Record
    future: "Future[Answer]"
    blocking: bool
    began: float


class Committer:
    """Commits records in the order in which they were put, as many at once as wait (group commit).

    A record that cannot be kept fails alone. When the history itself cannot be written (the disk is full), impatient
    records fail; patient ones stay at the head of the queue, so that no later record of their source overtakes them
    and moves its cursor past what is not durable, and are tried again every ``PAUSE_SECONDS``.

    Args:
        history: open to write; nobody else appends to it.
        max_records: how many records one commit takes at most.
        is_full: told (rounds committed or waiting, bytes that would wait), says whether a new record has to wait.
        on_answered: told of each record that was answered, with the answer and the seconds from ``began`` until then.
        before_commit: called before each commit, for what has to be durable before it.
    """

    def __init__(
        self,
        history: History,
        max_records: int,
        is_full: Callable[[int, int], bool],
        on_answered: Callable[[Record, Answer, float], None],
        before_commit: Callable[[], None] = lambda: None,
    ) -> None:
        """Start the thread."""
        self._history = history
        self._max_records = max_records
        self._is_full = is_full
        self._on_answered = on_answered
        self._before_commit = before_commit
        self._changed = threading.Condition()
        self._closing = threading.Event()
        self._queue: deque[_Pending] = deque()
        self._rounds = len(history)
        self._pending, self._pending_bytes = 0, 0  # queued, or in the commit that is going on
        self._fault: Exception | None = None  # of the last commit
        self._thread = threading.Thread(target=self._run, name="ingest-commit", daemon=True)
        self._thread.start()

    def put(self, record: Record, *, blocking: bool, began: float, known: bool = False) -> "Future[Answer]":
        """Queue a record; the future has the answer once that is durable.

        Args:
            record: what is to be kept.
            blocking: whether to wait for room, and for a disk that is full.
            began: when it arrived, by ``time.perf_counter``.
            known: whether its id is committed already; it then needs no room.

        Raises:
            BacklogFull: if there is no room and it is not patient.
            HistoryFull: the same, while patient ones wait for a disk that is full: that goes first, for a backlog gets
                shorter by itself, and somebody has to free some space.
            IngestClosed: if the committer is closed, also while waiting for room.
        """
        pending = _Pending(record, Future(), blocking, began)
        pending.future.set_running_or_notify_cancel()  # from here on it is too late to cancel
        size = len(record.payload)
        with self._changed:
            while not known and not self._closing.is_set() and self._is_full_with(size):
                if not blocking:
                    fault = self._fault
                    raise HistoryFull(*fault.args) if isinstance(fault, HistoryFull) else BacklogFull(1.0)
                self._changed.wait(0.05)  # nobody says when a round was learned
            if self._closing.is_set():
                raise IngestClosed("nothing is taken any more: stopping")
            self._queue.append(pending)
            self._pending += 1
            self._pending_bytes += size
            self._changed.notify_all()
        return pending.future

    def close(self) -> None:
        """Take nothing more, commit what is queued (once, if the disk is full) and end the thread."""
        with self._changed:
            self._closing.set()
            self._changed.notify_all()
        self._thread.join()

    def _is_full_with(self, size: int) -> bool:
        return self._is_full(self._rounds + self._pending, self._pending_bytes + size)

    def _run(self) -> None:
        while batch := self._next_batch():
            try:
                remaining, fault = self._commit(batch)
            except Exception as error:  # not known to happen; but without this thread nothing is durable any more
                _log.exception("committing failed")
                remaining, fault = [pending for pending in batch if not pending.future.done()], error
            if fault is not None:
                self._requeue(remaining, fault)

    def _next_batch(self) -> list[_Pending]:
        with self._changed:
            while not self._queue and not self._closing.is_set():
                self._changed.wait()
            return [self._queue.popleft() for _ in range(min(len(self._queue), self._max_records))]

    def _commit(self, batch: list[_Pending]) -> tuple[list[_Pending], Exception | None]:
        """Commit and answer a batch; returns what is left of it, and why, when the history cannot be written."""
        try:
            self._before_commit()
            answers = self._history.append([pending.record for pending in batch])
        except _STORAGE_ERRORS as fault:
            return batch, fault
        except Exception as error:
            if len(batch) == 1:
                _log.exception("the task %s cannot be kept", batch[0].record.id)
                self._release(batch)
                batch[0].future.set_exception(error)
                return [], None
            for at, pending in enumerate(batch):  # one of them is at fault: find it, and keep the others
                _, new_fault = self._commit([pending])
                if new_fault is not None:
                    return batch[at:], new_fault
            return [], None
        if self._fault is not None:
            _log.info("the history can be written again")
        self._fault = None
        self._release(batch, answers)
        for pending, answer in zip(batch, answers, strict=True):
            self._resolve(pending, answer)
        return [], None

    def _resolve(self, pending: _Pending, answer: Answer) -> None:
        try:
            self._on_answered(pending.record, answer, time.perf_counter() - pending.began)
        except Exception:
            _log.exception("counting a settled task failed")
        pending.future.set_result(answer)

    def _requeue(self, remaining: list[_Pending], fault: Exception) -> None:
        """Put the patient back at the head of the queue and pause; fail all others, or all when closing.

        Those queued behind are failed too: the next commit may again be made of patient ones only, and when closing
        none of them must move a cursor past what is not durable.
        """
        if self._fault is None:
            _log.error("the history cannot be written: %s", fault)
        self._fault = fault
        with self._changed:
            stopping = self._closing.is_set()
            pending = [*remaining, *self._queue]
            self._queue = deque(item for item in pending if item.blocking and not stopping)
            blocking = bool(self._queue)
        failed = [item for item in pending if stopping or not item.blocking]
        self._release(failed)
        for item in failed:
            item.future.set_exception(fault)
        if blocking:
            self._closing.wait(PAUSE_SECONDS)

    def _release(self, batch: list[_Pending], answers: Sequence[Answer] = ()) -> None:
        """Count a batch out; before its futures are done, so that who was answered sees the room."""
        with self._changed:
            self._rounds = max([self._rounds, *(answer.round + 1 for answer in answers)])
            self._pending -= len(batch)
            self._pending_bytes -= sum(len(pending.record.payload) for pending in batch)
            self._changed.notify_all()
