"""From arrival to durable round: validate, queue, commit together, answer; hold back when too much waits."""

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future

from streams import pull, wire
from streams.arrivals import Arrival, Conflict, Receipt, Record, Rejected, TaskSource
from streams.committer import Answer, Committer
from streams.dead_letters import DeadLetters
from streams.history import History
from streams.kept import is_kept, payload_of
from streams.spec import Limits, TaskSpec

QUEUE_BYTES = 64 * 1024 * 1024
"""How many bytes of payloads wait at most to be committed; the first one may always wait."""

_log = logging.getLogger(__name__)


class Ingest:
    """Takes arrivals from any thread and makes them durable, several with one commit, in the order they came.

    Args:
        history: open to write; nobody else appends to it.
        spec: what a task of this run looks like.
        limits: how much one may hold and how many may wait.
        learned: how many rounds have been learned; it must be quick and must not call back.
        rejected: told (source, reason) of each arrival that is refused; "conflict" is a reason too.
        committed: told (source, seconds from arrival to durable) of each new round.
        clock: the unix time in seconds that a round's arrival is noted by.
        letters: where refused arrivals are kept; None keeps none.
    """

    def __init__(
        self,
        history: History,
        spec: TaskSpec,
        limits: Limits,
        learned: Callable[[], int],
        rejected: Callable[[str, str], None],
        committed: Callable[[str, float], None],
        clock: Callable[[], float] = time.time,
        letters: DeadLetters | None = None,
    ) -> None:
        """Start the committing thread."""
        self._history = history
        self._spec = spec
        self._limits = limits
        self._learned = learned
        self._rejected = rejected
        self._committed = committed
        self._clock = clock
        self._letters = letters
        self._closing = threading.Event()
        self._pulls: dict[str, threading.Thread] = {}
        self._committer = Committer(history, limits.commit_batch, self._is_full, self._settled, self._sync_letters)

    def submit(self, arrival: Arrival, *, wait: bool) -> "Future[Answer]":
        """Validate an arrival in this thread and queue it; the future has the answer once that is durable.

        An id that is committed already is answered even when the backlog is full.

        Args:
            arrival: what came.
            wait: True for a source that is pulled: block until there is room, and wait for a full disk too, in
                order. False for one that is pushed: raise BacklogFull, and let the future raise HistoryFull.

        Raises:
            Rejected: if it is not a task of this run.
            BacklogFull: if there is no room (``wait=False``).
            HistoryFull: if there is no room because the disk is full (``wait=False``).
            IngestClosed: if this Ingest is closed, also while waiting for room.
        """
        began = time.perf_counter()
        try:
            record, known = self._examine(arrival)
        except Rejected as refusal:
            self._count(arrival.source, refusal.reason)
            self._bury(arrival, refusal, only_copy=wait)
            raise
        if isinstance(known, Conflict):
            self._bury(arrival, _refusal_of(known), only_copy=wait)
        if known is not None and record.cursor is None:
            answered: Future[Answer] = Future()
            self._settled(record, known, 0.0)
            answered.set_result(known)
            return answered
        return self._committer.put(record, patient=wait, began=began, known=known is not None)

    def submit_now(self, arrival: Arrival) -> "Future[Answer] | None":
        """Queue a new arrival whose bytes are kept as they came; None if only ``submit`` can tell what becomes of it.

        It takes no longer than looking at the bytes, so that an event loop can call it.

        Raises:
            BacklogFull: if there is no room.
            HistoryFull: if there is no room because the disk is full.
            IngestClosed: if this Ingest is closed.
        """
        began = time.perf_counter()
        fits = wire.is_id(arrival.id, self._limits) and is_kept(arrival.body, self._spec, self._limits)
        if not fits or self._history.find(arrival.id) is not None:
            return None
        record = self._record(arrival, arrival.body, wire.digest(arrival.body))
        return self._committer.put(record, patient=False, began=began)

    def refuse(self, arrival: Arrival, refusal: Rejected, *, whole: bool = True) -> None:
        """Count an arrival that is refused, and keep it as a dead letter; may wait for the disk.

        Args:
            arrival: what came, as far as it did.
            refusal: why it is refused.
            whole: whether all of the body was received.
        """
        self._count(arrival.source, refusal.reason)
        self._bury(arrival, refusal, whole)

    def pull(self, source_name: str, source: TaskSource) -> None:
        """Read a source in a thread of its own until ``close``, from behind its last committed task.

        Raises:
            ValueError: if a source of that name is being read already.
        """
        if source_name in self._pulls:
            raise ValueError(f"the source {source_name!r} is being read already; give each source its own name")

        def submit(arrival: Arrival) -> "Future[Answer]":
            return self.submit(arrival._replace(source=source_name), wait=True)

        arguments = (source_name, source, submit, self._history.cursor, self._closing, self._sync_letters)
        thread = threading.Thread(target=pull.follow, args=arguments, name=f"pull-{source_name}", daemon=True)
        self._pulls[source_name] = thread
        thread.start()

    def close(self, patience: float = 10.0) -> None:
        """Take nothing more, commit what is queued, end the threads; the history stays open.

        Args:
            patience: seconds to wait for each source to return from reading.
        """
        self._closing.set()
        self._committer.close()
        for name, thread in self._pulls.items():
            thread.join(timeout=patience)
            if thread.is_alive():
                _log.warning("the source %s does not return from reading; it is left behind", name)

    def _examine(self, arrival: Arrival) -> tuple[Record, Answer | None]:
        """Return what is to be kept and, if its id is committed already, the answer (nothing is decoded then)."""
        if arrival.refused is not None:
            raise arrival.refused
        wire.check_id(arrival.id, self._limits)
        digest = wire.digest(arrival.body)
        round = self._history.find(arrival.id)
        if round is None:
            return self._record(arrival, payload_of(arrival.body, self._spec, self._limits), digest), None
        same = self._history.entry(round).digest == digest
        answer = Receipt(arrival.id, round, duplicate=True) if same else Conflict(arrival.id, round)
        return self._record(arrival, b"", digest), answer

    def _record(self, arrival: Arrival, payload: bytes, digest: bytes) -> Record:
        return Record(arrival.id, payload, digest, arrival.source, arrival.cursor, self._clock())

    def _is_full(self, rounds: int, waiting_bytes: int) -> bool:
        return rounds - self._learned() >= self._limits.backlog or waiting_bytes > self._most_bytes

    @property
    def _most_bytes(self) -> int:
        return max(QUEUE_BYTES, 4 * self._limits.body_bytes)

    def _settled(self, record: Record, answer: Answer, seconds: float) -> None:
        if isinstance(answer, Conflict):
            self._count(record.source, "conflict")
            if record.payload:  # the id was taken while this one was queued: no letter has been written yet
                arrival = Arrival(record.id, record.payload, record.source, None)
                self._bury(arrival, _refusal_of(answer), only_copy=record.source in self._pulls)
        elif not answer.duplicate:
            self._committed(record.source, seconds)

    def _count(self, source: str, reason: str) -> None:
        try:
            self._rejected(source, reason)
        except Exception:
            _log.exception("counting a rejected task failed")

    def _bury(self, arrival: Arrival, refusal: Rejected, whole: bool = True, *, only_copy: bool = False) -> None:
        if self._letters is not None:
            self._letters.put(arrival, refusal, whole=whole, only_copy=only_copy)

    def _sync_letters(self) -> None:
        if self._letters is not None:
            self._letters.sync()


def _refusal_of(conflict: Conflict) -> Rejected:
    return Rejected("conflict", f"the id belongs to round {conflict.round}, which was made of other bytes")
