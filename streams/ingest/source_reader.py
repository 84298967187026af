"""Read sources while the daemon runs: reconnect after failures, acknowledge arrivals and monitor the lag."""

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from math import nan
from typing import NamedTuple

from tenacity import RetryCallState, Retrying, sleep_using_event, stop_when_event_set, wait_random_exponential
from tenacity.retry import retry_if_exception_type

from streams.types import Acknowledges, Arrival, Conflict, Gap, IngestClosed, Receipt, Rejected, ReportsLag, TaskSource

INTERVAL_SECONDS = 5.0


_log = logging.getLogger(__name__)


class SourceState(NamedTuple):
    """How a source answers, as of its last attempts.

    Attributes:
        answered: when it last yielded, by the clock of ``SourceStates``; None if it never has.
        errors: the errors of the last attempts, by what was attempted.
        failing_since: when the first of the failures in a row happened; None without an error.
        gaps: how often entries were found to be deleted before they were read.
        lost_entries: how many these were, as far as their number is known.
        last_gap: the last such gap.
    """

    answered: float | None = None
    errors: tuple[tuple[str, str], ...] = ()
    failing_since: float | None = None
    gaps: int = 0
    lost_entries: int = 0
    last_gap: Gap | None = None


class SourceStates:
    """The state of each source that is read; any thread may record and read.

    Args:
        clock: returns seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Start without a source."""
        self._clock = clock
        self._lock = threading.Lock()
        self._states: dict[str, SourceState] = {}

    def note(self, source: str, attempt: str, error: str = "") -> None:
        """Record the result of an attempt ("read" or "lag"); ``error`` is "" if the source answered."""
        now = self._clock()
        with self._lock:
            before = self._states.get(source, SourceState())
            errors = {**dict(before.errors), attempt: error}
            left = tuple((key, text) for key, text in errors.items() if text)
            since = None if not left else now if before.failing_since is None else before.failing_since
            answered = now if attempt == "read" and not error else before.answered
            self._states[source] = before._replace(answered=answered, errors=left, failing_since=since)

    def note_gap(self, source: str, gap: Gap) -> None:
        """Record a gap in a source's stream."""
        with self._lock:
            before = self._states.get(source, SourceState())
            lost = before.lost_entries + (gap.entries or 0)
            self._states[source] = before._replace(gaps=before.gaps + 1, lost_entries=lost, last_gap=gap)

    def states(self) -> dict[str, SourceState]:
        """Return the state of each source by its name."""
        with self._lock:
            return dict(self._states)


class LagMonitor:
    """Threads that poll the lag of sources, one per source, so that a slow broker delays nothing else.

    Args:
        sources: the sources by name; those that do not implement ``ReportsLag`` are ignored.
        cursor: returns the committed position of a source by its name, None if there is none.
        on_lag: called with the name and the number of waiting entries; NaN if that is unknown.
        interval: seconds between two polls of a source.
        on_polled: called with the name and the error of each poll, "" if the source answered.
    """

    def __init__(
        self,
        sources: Mapping[str, TaskSource | None],
        cursor: Callable[[str], str | None],
        on_lag: Callable[[str, float], None],
        interval: float = INTERVAL_SECONDS,
        on_polled: Callable[[str, str], None] = lambda name, error: None,
    ) -> None:
        """Start the threads."""
        self._cursor, self._on_lag, self._interval, self._on_polled = cursor, on_lag, interval, on_polled
        self._closing = threading.Event()
        self._threads = [
            threading.Thread(target=self._poll, args=(name, source), name=f"lag-{name}", daemon=True)
            for name, source in sources.items()
            if isinstance(source, ReportsLag)
        ]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Stop polling, without waiting for a poll in progress."""
        self._closing.set()
        for thread in self._threads:
            thread.join(timeout=0.5)

    def _poll(self, name: str, source: ReportsLag) -> None:
        while not self._closing.is_set():
            problem = ""
            try:
                waiting = source.lag(self._cursor(name))
            except Exception as error:  # the thread that reads the source logs the cause and reconnects
                _log.debug("the lag of the source %s is unknown: %s", name, error)
                waiting, problem = None, f"{type(error).__name__}: {error}"
            if not self._closing.is_set():
                self._on_lag(name, nan if waiting is None else float(waiting))
                self._on_polled(name, problem)
            self._closing.wait(self._interval)


ACK_BATCH = 64
"""How many answered arrivals are acknowledged together while the source yields more."""


class AckTracker:
    """A queue of answered arrivals: any thread adds to it, and the thread that reads the source acknowledges them.

    For a source that does not implement ``Acknowledges``, it does nothing. ``sync_dead_letters`` is called before
    rejected arrivals are acknowledged.
    """

    def __init__(self, source: TaskSource, sync_dead_letters: Callable[[], None] = lambda: None) -> None:
        """Start with an empty queue."""
        self._sync_dead_letters = sync_dead_letters
        self._source = source if isinstance(source, Acknowledges) else None
        self._answered: queue.SimpleQueue[Arrival | None] = queue.SimpleQueue()  # None: the arrival was not stored
        self._outstanding = 0

    def track(self, arrival: Arrival, future: "Future[Receipt | Conflict]") -> None:
        """Queue an acknowledgement for when the future resolves; an exception means that the arrival was not stored."""
        if self._source is not None:
            self._outstanding += 1
            without_body = arrival._replace(body=b"")  # the body waits in the commit queue already
            future.add_done_callback(lambda done: self._answered.put(_outcome(without_body, done)))

    def reject(self, arrival: Arrival, rejection: Rejected) -> None:
        """Queue an acknowledgement of a rejected arrival."""
        if self._source is not None:
            self._outstanding += 1
            self._answered.put(arrival._replace(body=b"", rejection=rejection))

    def flush(self, minimum: int = 1) -> None:
        """Acknowledge all answered arrivals if there are at least ``minimum``; raises whatever the source raises."""
        if self._source is None or self._answered.qsize() < minimum:
            return
        answered = [self._answered.get() for _ in range(self._answered.qsize())]
        self._outstanding -= len(answered)
        acked = [arrival for arrival in answered if arrival is not None]
        if any(arrival.rejection is not None for arrival in acked):
            self._sync_dead_letters()
        if acked:
            self._source.ack(acked)

    def drain(self, name: str, timeout: float) -> None:
        """Acknowledge all arrivals answered within ``timeout`` seconds; the others are read again after a restart."""
        end = time.monotonic() + timeout
        try:
            while self._source is not None and self._outstanding and time.monotonic() < end:
                self._answered.put(self._answered.get(timeout=max(end - time.monotonic(), 0.001)))
                self.flush()
        except queue.Empty:
            pass
        except Exception as error:
            _log.warning("acknowledging to the source %s failed: %s: %s", name, type(error).__name__, error)


def _outcome(arrival: Arrival, done: "Future[Receipt | Conflict]") -> Arrival | None:
    """Return the arrival to acknowledge for an answered future, None if the arrival was not stored."""
    if done.exception() is not None:
        return None
    answer = done.result()
    if not isinstance(answer, Conflict):
        return arrival
    rejection = Rejected("conflict", f"the id belongs to round {answer.round}, which has a different body")
    return arrival._replace(rejection=rejection)


IDLE_SECONDS = 0.05
"""How long to pause after a source yields None."""


ACK_DRAIN_SECONDS = 5.0
"""How long closing waits for the last arrivals to become durable, so that they can be acknowledged."""


def read_until_closed(
    name: str,
    source: TaskSource,
    submit: Callable[[Arrival], "Future[Receipt | Conflict]"],
    cursor: Callable[[str], str | None],
    closing: threading.Event,
    sync_dead_letters: Callable[[], None] = lambda: None,
    on_read: Callable[[str], None] = lambda error: None,
) -> None:
    """Submit everything that a source yields until ``closing``, and reconnect with random exponential backoff.

    Each connection starts at the committed cursor: uncommitted arrivals are read again, and committed ones are
    recognised by their ids. A rejected arrival is logged and skipped. A source that implements ``Acknowledges`` gets an
    acknowledgement for each arrival that is durable or rejected.

    Args:
        name: the name of the source.
        source: the source to read.
        submit: validates an arrival, waits for room and queues it.
        cursor: returns the committed position of a source by its name, None if there is none.
        closing: set when reading must stop.
        sync_dead_letters: called before rejected arrivals are acknowledged, because the source then forgets them.
        on_read: called with "" whenever the source yields, and with the error when it fails.
    """
    while not closing.is_set():
        reconnect = Retrying(
            retry=retry_if_exception_type(_NoArrivalYet),
            stop=stop_when_event_set(closing),
            wait=wait_random_exponential(multiplier=0.5, max=30.0),
            sleep=sleep_using_event(closing),
            before_sleep=lambda state: _log_failure(name, state),
            retry_error_callback=lambda state: None,
        )
        reconnect(_read, name, source, submit, cursor, closing, sync_dead_letters, on_read)
        closing.wait(0.5)


class _NoArrivalYet(Exception):
    """The source failed before it yielded an arrival, so the next wait is longer."""


def _read(
    name: str,
    source: TaskSource,
    submit: Callable[[Arrival], "Future[Receipt | Conflict]"],
    cursor: Callable[[str], str | None],
    closing: threading.Event,
    sync_dead_letters: Callable[[], None] = lambda: None,
    on_read: Callable[[str], None] = lambda error: None,
) -> None:
    """Read until ``closing`` or until the source fails; raise only if it failed before it yielded an arrival."""
    last: Future[Receipt | Conflict] | None = None
    received_any = False
    arrivals: Iterator[Arrival | None] | None = None
    acks = AckTracker(source, sync_dead_letters)
    try:
        arrivals = source.read(cursor(name))
        for arrival in arrivals:
            on_read("")
            if arrival is not None:
                received_any = True
                last = _submit(name, arrival, submit, acks) or last
            acks.flush(1 if arrival is None else ACK_BATCH)
            if closing.is_set() or (arrival is None and closing.wait(IDLE_SECONDS)):
                return
        raise ConnectionError("it ended")
    except IngestClosed:
        return
    except Exception as error:
        on_read(f"{type(error).__name__}: {error}")
        if not received_any:
            raise _NoArrivalYet(f"{type(error).__name__}: {error}") from error
        _log.warning("the source %s failed and will be read again: %s: %s", name, type(error).__name__, error)
        _wait_for_answer(last, closing)
    finally:
        if closing.is_set():
            acks.drain(name, ACK_DRAIN_SECONDS)
        close = getattr(arrivals, "close", None)
        if close is not None:
            close()


def _submit(
    name: str,
    arrival: Arrival,
    submit: Callable[[Arrival], "Future[Receipt | Conflict]"],
    acks: AckTracker,
) -> "Future[Receipt | Conflict] | None":
    """Submit an arrival; return the future of its answer, None if it was rejected."""
    try:
        future = submit(arrival)
    except Rejected as rejection:
        _log.warning("the source %s delivered %.80r, which was rejected: %s", name, arrival.id, rejection)
        acks.reject(arrival, rejection)
        return None
    acks.track(arrival, future)
    future.add_done_callback(lambda done: _log_answer(name, arrival.id, done))
    return future


def _wait_for_answer(last: "Future[Receipt | Conflict] | None", closing: threading.Event) -> None:
    """Wait until everything queued is answered, because a second reading could cut the same rows differently."""
    while last is not None and not last.done() and not closing.wait(IDLE_SECONDS):
        pass


def _log_answer(name: str, id: str, done: "Future[Receipt | Conflict]") -> None:
    error = done.exception()
    if error is not None:
        _log.error("the source %s delivered %s, which was not stored: %s", name, id, error)
    elif isinstance(answer := done.result(), Conflict):
        _log.warning("the source %s delivered %s with a different body than round %d", name, id, answer.round)


def _log_failure(name: str, state: RetryCallState) -> None:
    error = state.outcome.exception() if state.outcome is not None else None
    wait = state.next_action.sleep if state.next_action is not None else 0.0
    _log.warning("the source %s cannot be read, trying again in %.1f s: %s", name, wait, error)
