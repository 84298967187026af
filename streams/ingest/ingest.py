"""Turn arrivals into durable rounds: validate, queue, commit in groups and answer, with backpressure."""

import logging
import threading
import time
from collections.abc import Callable, Collection
from concurrent.futures import Future
from functools import partial

from online_meta.types import Task
from streams.formats import wire
from streams.formats.json_body import read_as_safetensors
from streams.formats.wire import canonical_bytes, is_canonical
from streams.history.history import History, decode_view
from streams.ingest import source_reader
from streams.ingest.dead_letters import DeadLetters
from streams.ingest.group_commit import Answer, Committer
from streams.ingest.outliers import WINDOW, OutlierFilter
from streams.spec import Limits, TaskSpec
from streams.types import Arrival, Conflict, Gap, Receipt, Record, Rejected, ReportsGaps, ReportsOmissions, TaskSource

QUEUE_BYTES = 64 * 1024 * 1024
"""How many bytes of payloads may wait to be committed."""

_log = logging.getLogger(__name__)


class Ingest:
    """The entry point of tasks: accepts arrivals from any thread and commits them in groups, in order of arrival.

    Args:
        history: opened for writing; nothing else appends to it.
        spec: the shape and dtypes of the run's tasks.
        limits: bounds on one arrival and on the backlog.
        count_learned: returns the number of learned rounds; it must be fast and must not call back.
        on_rejected: called with (source, reason) for each rejected arrival; "conflict" is a reason too.
        on_committed: called with (source, seconds from arrival to durability) for each new round.
        clock: returns the Unix time in seconds, which is recorded as the time of arrival.
        dead_letters: keeps rejected arrivals; None keeps none.
        on_gap: called with (source, gap) for each gap that a source finds in its stream.
        try_task: raises ``Rejected`` for a task that the model cannot process; None if tasks are not tried.
        outlier_sources: the names of the sources whose outliers are refused, see ``streams.ingest.outliers``.

    ``source_states`` says how each source that is read answers.
    """

    def __init__(
        self,
        history: History,
        spec: TaskSpec,
        limits: Limits,
        count_learned: Callable[[], int],
        on_rejected: Callable[[str, str], None],
        on_committed: Callable[[str, float], None],
        clock: Callable[[], float] = time.time,
        dead_letters: DeadLetters | None = None,
        on_gap: Callable[[str, Gap], None] = lambda source, gap: None,
        try_task: Callable[[Task], None] | None = None,
        outlier_sources: Collection[str] = (),
    ) -> None:
        """Start the thread that commits."""
        self._history = history
        self._spec = spec
        self._limits = limits
        self._count_learned = count_learned
        self._on_rejected = on_rejected
        self._on_committed = on_committed
        self._clock = clock
        self._dead_letters = dead_letters
        self._on_gap = on_gap
        self._try_task = try_task
        self._outliers = {name: OutlierFilter(history.scales(name, WINDOW)) for name in outlier_sources}
        self._closing = threading.Event()
        self._pull_threads: dict[str, threading.Thread] = {}
        self._pulled: dict[str, TaskSource] = {}
        self.source_states = source_reader.SourceStates()
        self._committer = Committer(
            history, limits.commit_batch, self._is_full, self._note_answer, self._sync_dead_letters
        )

    def submit(self, arrival: Arrival, *, wait: bool) -> "Future[Answer]":
        """Validate an arrival in this thread and queue it; the future resolves once the task is durable.

        An id that is already committed is answered even if the backlog is full.

        Args:
            arrival: the arrival.
            wait: True for a source that is read: block until there is room, and wait for space on a full disk. False
                for a pushed task: raise ``BacklogFull``, and let the future raise ``HistoryFull``.

        Returns:
            A future of the receipt or the conflict.

        Raises:
            Rejected: if the arrival is not a valid task of this run.
            BacklogFull: if there is no room (``wait=False``).
            HistoryFull: if there is no room because the disk is full (``wait=False``).
            IngestClosed: if this ``Ingest`` is closed, also while waiting for room.
        """
        began = time.perf_counter()
        try:
            record, known = self._validate(arrival)
            if known is None and (outliers := self._outliers.get(arrival.source)) is not None:
                return outliers.submit(
                    decode_view(record.payload),
                    lambda scales: self._committer.put(record._replace(scales=scales), blocking=wait, began=began),
                )
        except Rejected as rejection:
            self._count_rejected(arrival.source, rejection.reason)
            self._dead_letter(arrival, rejection, only_copy=wait)
            raise
        if isinstance(known, Conflict):
            self._dead_letter(arrival, _conflict_rejection(known), only_copy=wait)
        if known is not None and record.cursor is None:
            answered: Future[Answer] = Future()
            self._note_answer(record, known, 0.0)
            answered.set_result(known)
            return answered
        return self._committer.put(record, blocking=wait, began=began, known=known is not None)

    def submit_nowait(self, arrival: Arrival) -> "Future[Answer] | None":
        """Queue a new arrival whose body is canonical, or JSON of such a body; otherwise queue nothing and return None.

        An event loop can call this for small bodies, because it takes no longer than reading the bytes. If it returns
        None, as it always does where the model tries tasks or the source refuses outliers, call ``submit``, which also
        decodes, rejects and recognises duplicates.

        Raises:
            BacklogFull: if there is no room.
            HistoryFull: if there is no room because the disk is full.
            IngestClosed: if this ``Ingest`` is closed.
        """
        if self._try_task is not None or arrival.source in self._outliers:
            return None
        began = time.perf_counter()
        if not wire.is_valid_id(arrival.id, self._limits) or self._history.find(arrival.id) is not None:
            return None
        if self._history.is_forgotten(arrival.id):
            return None
        try:
            payload = read_as_safetensors(arrival.body, self._spec, self._limits)
        except Rejected:
            return None
        if not is_canonical(payload, self._spec, self._limits):
            return None
        record = self._record(arrival, payload, wire.digest(arrival.body))
        return self._committer.put(record, blocking=False, began=began)

    def reject(self, arrival: Arrival, rejection: Rejected, *, complete: bool = True) -> None:
        """Count a rejected arrival and keep it as a dead letter; this may wait for the disk.

        Args:
            arrival: the arrival, with as much of its body as was received.
            rejection: why it is rejected.
            complete: whether the whole body was received.
        """
        self._count_rejected(arrival.source, rejection.reason)
        self._dead_letter(arrival, rejection, complete)

    def keep(self, arrival: Arrival, rejection: Rejected) -> None:
        """Keep a task that was accepted, but cannot be learned, as a dead letter; this may wait for the disk."""
        self._dead_letter(arrival, rejection)

    def pull(self, source_name: str, source: TaskSource) -> None:
        """Read a source in its own thread until ``close``, starting after its last committed task.

        Raises:
            ValueError: if a source of that name is already being read.
        """
        if source_name in self._pull_threads:
            raise ValueError(f"the source {source_name!r} is already being read; give each source its own name")

        def submit(arrival: Arrival) -> "Future[Answer]":
            return self.submit(arrival._replace(source=source_name), wait=True)

        if isinstance(source, ReportsGaps):
            source.listen_for_gaps(partial(self._note_gap, source_name))
        on_read = partial(self.source_states.note, source_name, "read")
        arguments = (source_name, source, submit, self._history.cursor, self._closing, self._sync_dead_letters, on_read)
        thread = threading.Thread(
            target=source_reader.read_until_closed, args=arguments, name=f"pull-{source_name}", daemon=True
        )
        self._pull_threads[source_name], self._pulled[source_name] = thread, source
        thread.start()

    def list_omissions(self) -> dict[str, list[str]]:
        """Return what each source that is read ignores now, and why, by its name; only those that ignore something."""
        found = {name: one.omissions() for name, one in [*self._pulled.items()] if isinstance(one, ReportsOmissions)}
        return {name: list(omissions) for name, omissions in found.items() if omissions}

    def commit_error(self) -> Exception | None:
        """Return the error of the last commit; None if it succeeded."""
        return self._committer.fault

    def close(self, timeout: float = 10.0) -> None:
        """Accept no more tasks, commit the queue and stop the threads; the history stays open.

        Args:
            timeout: how long to wait for each source to return from reading, in seconds.
        """
        self._closing.set()
        self._committer.close()
        for name, thread in self._pull_threads.items():
            thread.join(timeout=timeout)
            if thread.is_alive():
                _log.warning("the source %s does not return from reading; its thread is abandoned", name)

    def _validate(self, arrival: Arrival) -> tuple[Record, Answer | None]:
        """Return the record to commit and, if its id is already committed, the answer (without decoding the body)."""
        if arrival.rejection is not None:
            raise arrival.rejection
        wire.check_id(arrival.id, self._limits)
        if self._history.is_forgotten(arrival.id):
            raise Rejected("forgotten", "this task was erased with its entity, and is not taken again")
        digest = wire.digest(arrival.body)
        round = self._history.find(arrival.id)
        if round is None:
            payload = canonical_bytes(
                read_as_safetensors(arrival.body, self._spec, self._limits), self._spec, self._limits
            )
            if self._try_task is not None:
                self._try_task(decode_view(payload))
            return self._record(arrival, payload, digest), None
        same = self._history.entry(round).digest == digest
        answer = Receipt(arrival.id, round, duplicate=True) if same else Conflict(arrival.id, round)
        return self._record(arrival, b"", digest), answer

    def _record(self, arrival: Arrival, payload: bytes, digest: bytes) -> Record:
        return Record(arrival.id, payload, digest, arrival.source, arrival.cursor, self._clock())

    def _is_full(self, rounds: int, pending_bytes: int) -> bool:
        return rounds - self._count_learned() >= self._limits.backlog or pending_bytes > self._max_queue_bytes

    @property
    def _max_queue_bytes(self) -> int:
        return max(QUEUE_BYTES, 4 * self._limits.body_bytes)

    def _note_answer(self, record: Record, answer: Answer, seconds: float) -> None:
        if isinstance(answer, Conflict):
            self._count_rejected(record.source, "conflict")
            if record.payload:  # the id was taken while this record was queued, so no letter has been written yet
                arrival = Arrival(record.id, record.payload, record.source, None)
                self._dead_letter(arrival, _conflict_rejection(answer), only_copy=record.source in self._pull_threads)
        elif not answer.duplicate:
            self._on_committed(record.source, seconds)

    def _note_gap(self, source: str, gap: Gap) -> None:
        self.source_states.note_gap(source, gap)
        self._on_gap(source, gap)

    def _count_rejected(self, source: str, reason: str) -> None:
        try:
            self._on_rejected(source, reason)
        except Exception:
            _log.exception("counting a rejected task failed")

    def _dead_letter(
        self, arrival: Arrival, rejection: Rejected, complete: bool = True, *, only_copy: bool = False
    ) -> None:
        if self._dead_letters is not None and rejection.reason != "forgotten":
            self._dead_letters.put(arrival, rejection, complete=complete, only_copy=only_copy)

    def _sync_dead_letters(self) -> None:
        if self._dead_letters is not None:
            self._dead_letters.sync()


def _conflict_rejection(conflict: Conflict) -> Rejected:
    return Rejected("conflict", f"the id belongs to round {conflict.round}, which has a different body")
