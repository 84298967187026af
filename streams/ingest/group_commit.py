"""Commit many arrivals together: a queue, and the thread that makes its records durable and answers them."""

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
"""Errors of the history; any other error is attributed to a record."""

PAUSE_SECONDS = 1.0
"""How long to wait before the next attempt after the history could not be written."""

_log = logging.getLogger(__name__)


class _Pending(NamedTuple):
    record: Record
    future: "Future[Answer]"
    blocking: bool
    began: float


class Committer:
    """A queue of records and the thread that commits all waiting records together (group commit), in order.

    A record that cannot be stored fails alone. When the history itself cannot be written (the disk is full),
    non-blocking records fail. Blocking records stay at the head of the queue and are tried again every
    ``PAUSE_SECONDS``, so that no later record of their source advances its cursor past one that is not durable.

    Args:
        history: opened for writing; nothing else appends to it.
        max_records: the largest number of records in one commit.
        is_full: called with (rounds committed or waiting, bytes that would wait); returns whether a new record must
            wait.
        on_answered: called with each answered record, its answer and the seconds since ``began``.
        before_commit: called before each commit, to make durable what must be durable before it.

    ``fault`` is the error of the last commit if the history could not be written, otherwise None.
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
        self._pending, self._pending_bytes = 0, 0  # queued or in the current commit
        self.fault: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="ingest-commit", daemon=True)
        self._thread.start()

    def put(self, record: Record, *, blocking: bool, began: float, known: bool = False) -> "Future[Answer]":
        """Queue a record; the future resolves once the record is durable.

        Args:
            record: the record to commit.
            blocking: whether to wait for room in the queue and for space on a full disk.
            began: when the record arrived, by ``time.perf_counter``.
            known: whether its id is already committed; it then needs no room.

        Raises:
            BacklogFull: if there is no room and ``blocking`` is false.
            HistoryFull: if, in addition, blocking records wait for space on a full disk. It takes precedence because a
                backlog shrinks by itself, whereas somebody has to free space.
            IngestClosed: if the committer is closed, also while waiting for room.
        """
        pending = _Pending(record, Future(), blocking, began)
        pending.future.set_running_or_notify_cancel()  # from here on the future cannot be cancelled
        size = len(record.payload)
        with self._changed:
            while not known and not self._closing.is_set() and self._is_full_with(size):
                if not blocking:
                    fault = self.fault
                    raise HistoryFull(*fault.args) if isinstance(fault, HistoryFull) else BacklogFull(1.0)
                self._changed.wait(0.05)  # poll: no notification arrives when a round is learned
            if self._closing.is_set():
                raise IngestClosed("no more tasks are accepted: the process is stopping")
            self._queue.append(pending)
            self._pending += 1
            self._pending_bytes += size
            self._changed.notify_all()
        return pending.future

    def close(self) -> None:
        """Accept no more records, commit the queue (with one attempt if the disk is full) and stop the thread."""
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
            except Exception as error:  # not expected, but without this thread nothing would become durable
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
        """Commit and answer a batch; return the unanswered rest and the error if the history cannot be written."""
        try:
            self._before_commit()
            answers = self._history.append([pending.record for pending in batch])
        except _STORAGE_ERRORS as fault:
            return batch, fault
        except Exception as error:
            if len(batch) == 1:
                _log.exception("the task %s cannot be stored", batch[0].record.id)
                self._release(batch)
                batch[0].future.set_exception(error)
                return [], None
            for at, pending in enumerate(batch):  # find the faulty record and commit the others
                _, new_fault = self._commit([pending])
                if new_fault is not None:
                    return batch[at:], new_fault
            return [], None
        if self.fault is not None:
            _log.info("the history can be written again")
        self.fault = None
        self._release(batch, answers)
        for pending, answer in zip(batch, answers, strict=True):
            self._resolve(pending, answer)
        return [], None

    def _resolve(self, pending: _Pending, answer: Answer) -> None:
        try:
            self._on_answered(pending.record, answer, time.perf_counter() - pending.began)
        except Exception:
            _log.exception("counting an answered task failed")
        pending.future.set_result(answer)

    def _requeue(self, remaining: list[_Pending], fault: Exception) -> None:
        """Return blocking records to the head of the queue and pause; fail all others, or all records when closing.

        Non-blocking records in the queue fail too, because the next commit may consist of blocking records only. When
        closing, no record may advance a cursor past one that is not durable.
        """
        if self.fault is None:
            _log.error("the history cannot be written: %s", fault)
        self.fault = fault
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
        """Subtract a batch from the counts; call it before resolving the futures, so that clients see the room."""
        with self._changed:
            self._rounds = max([self._rounds, *(answer.round + 1 for answer in answers)])
            self._pending -= len(batch)
            self._pending_bytes -= sum(len(pending.record.payload) for pending in batch)
            self._changed.notify_all()
