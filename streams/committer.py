"""Many arrivals, one commit: a queue, and the thread that makes what is in it durable and answers."""

import logging
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import NamedTuple

from streams.arrivals import BacklogFull, Conflict, IngestClosed, Receipt, Record
from streams.history import History
from streams.ledger import HistoryDamaged, HistoryFull

Answer = Receipt | Conflict

_STORE_FAULTS = (HistoryFull, HistoryDamaged, sqlite3.OperationalError, OSError)
"""What is the history's fault; any other error is put down to a record."""

PAUSE_SECONDS = 1.0
"""How long a history that could not be written is left alone before the next try."""

_log = logging.getLogger(__name__)


class _Waiting(NamedTuple):
    record: Record
    future: "Future[Answer]"
    patient: bool
    began: float


class Committer:
    """Commits records in the order in which they were put, as many at once as wait (group commit).

    A record that cannot be kept fails alone. When the history itself cannot be written (the disk is full), impatient
    records fail; patient ones stay at the head of the queue, so that no later record of their source overtakes them
    and moves its cursor past what is not durable, and are tried again every ``PAUSE_SECONDS``.

    Args:
        history: open to write; nobody else appends to it.
        most: how many records one commit takes at most.
        is_full: told (rounds committed or waiting, bytes that would wait), says whether a new record has to wait.
        settled: told of each record that was answered, with the answer and the seconds from ``began`` until then.
        prepare: called before each commit, for what has to be durable before it.
    """

    def __init__(
        self,
        history: History,
        most: int,
        is_full: Callable[[int, int], bool],
        settled: Callable[[Record, Answer, float], None],
        prepare: Callable[[], None] = lambda: None,
    ) -> None:
        """Start the thread."""
        self._history = history
        self._most = most
        self._is_full = is_full
        self._settled = settled
        self._prepare = prepare
        self._changed = threading.Condition()
        self._closing = threading.Event()
        self._queue: deque[_Waiting] = deque()
        self._rounds = len(history)
        self._waiting, self._waiting_bytes = 0, 0  # queued, or in the commit that is going on
        self._fault: Exception | None = None  # of the last commit
        self._thread = threading.Thread(target=self._run, name="ingest-commit", daemon=True)
        self._thread.start()

    def put(self, record: Record, *, patient: bool, began: float, known: bool = False) -> "Future[Answer]":
        """Queue a record; the future has the answer once that is durable.

        Args:
            record: what is to be kept.
            patient: whether to wait for room, and for a disk that is full.
            began: when it arrived, by ``time.perf_counter``.
            known: whether its id is committed already; it then needs no room.

        Raises:
            BacklogFull: if there is no room and it is not patient.
            HistoryFull: the same, while patient ones wait for a disk that is full: that goes first, for a backlog gets
                shorter by itself, and somebody has to free some space.
            IngestClosed: if the committer is closed, also while waiting for room.
        """
        waiting = _Waiting(record, Future(), patient, began)
        waiting.future.set_running_or_notify_cancel()  # from here on it is too late to cancel
        size = len(record.payload)
        with self._changed:
            while not known and not self._closing.is_set() and self._is_full_with(size):
                if not patient:
                    fault = self._fault
                    raise HistoryFull(*fault.args) if isinstance(fault, HistoryFull) else BacklogFull(1.0)
                self._changed.wait(0.05)  # nobody says when a round was learned
            if self._closing.is_set():
                raise IngestClosed("nothing is taken any more: stopping")
            self._queue.append(waiting)
            self._waiting += 1
            self._waiting_bytes += size
            self._changed.notify_all()
        return waiting.future

    def close(self) -> None:
        """Take nothing more, commit what is queued (once, if the disk is full) and end the thread."""
        with self._changed:
            self._closing.set()
            self._changed.notify_all()
        self._thread.join()

    def _is_full_with(self, size: int) -> bool:
        return self._is_full(self._rounds + self._waiting, self._waiting_bytes + size)

    def _run(self) -> None:
        while batch := self._next_batch():
            try:
                left, fault = self._commit(batch)
            except Exception as error:  # not known to happen; but without this thread nothing is durable any more
                _log.exception("committing failed")
                left, fault = [waiting for waiting in batch if not waiting.future.done()], error
            if fault is not None:
                self._hold(left, fault)

    def _next_batch(self) -> list[_Waiting]:
        with self._changed:
            while not self._queue and not self._closing.is_set():
                self._changed.wait()
            return [self._queue.popleft() for _ in range(min(len(self._queue), self._most))]

    def _commit(self, batch: list[_Waiting]) -> tuple[list[_Waiting], Exception | None]:
        """Commit and answer a batch; returns what is left of it, and why, when the history cannot be written."""
        try:
            self._prepare()
            answers = self._history.append([waiting.record for waiting in batch])
        except _STORE_FAULTS as fault:
            return batch, fault
        except Exception as error:
            if len(batch) == 1:
                _log.exception("the task %s cannot be kept", batch[0].record.id)
                self._leave(batch)
                batch[0].future.set_exception(error)
                return [], None
            for at, waiting in enumerate(batch):  # one of them is at fault: find it, and keep the others
                _, fault_now = self._commit([waiting])
                if fault_now is not None:
                    return batch[at:], fault_now
            return [], None
        if self._fault is not None:
            _log.info("the history can be written again")
        self._fault = None
        self._leave(batch, answers)
        for waiting, answer in zip(batch, answers, strict=True):
            self._answer(waiting, answer)
        return [], None

    def _answer(self, waiting: _Waiting, answer: Answer) -> None:
        try:
            self._settled(waiting.record, answer, time.perf_counter() - waiting.began)
        except Exception:
            _log.exception("counting a settled task failed")
        waiting.future.set_result(answer)

    def _hold(self, left: list[_Waiting], fault: Exception) -> None:
        """Put the patient back at the head of the queue and pause; fail all others, or all when closing.

        Those queued behind are failed too: the next commit may again be made of patient ones only, and when closing
        none of them must move a cursor past what is not durable.
        """
        if self._fault is None:
            _log.error("the history cannot be written: %s", fault)
        self._fault = fault
        with self._changed:
            stopping = self._closing.is_set()
            waiting = [*left, *self._queue]
            self._queue = deque(one for one in waiting if one.patient and not stopping)
            patient = bool(self._queue)
        failed = [one for one in waiting if stopping or not one.patient]
        self._leave(failed)
        for one in failed:
            one.future.set_exception(fault)
        if patient:
            self._closing.wait(PAUSE_SECONDS)

    def _leave(self, batch: list[_Waiting], answers: Sequence[Answer] = ()) -> None:
        """Count a batch out; before its futures are done, so that who was answered sees the room."""
        with self._changed:
            self._rounds = max([self._rounds, *(answer.round + 1 for answer in answers)])
            self._waiting -= len(batch)
            self._waiting_bytes -= sum(len(waiting.record.payload) for waiting in batch)
            self._changed.notify_all()
