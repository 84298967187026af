"""Read a source for as long as the daemon lives, whatever happens to the source."""

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from math import nan

from tenacity import RetryCallState, Retrying, sleep_using_event, stop_when_event_set, wait_random_exponential
from tenacity.retry import retry_if_exception_type

from streams.types import Acknowledges, Arrival, Conflict, IngestClosed, Receipt, Rejected, ReportsLag, TaskSource

INTERVAL_SECONDS = 5.0


_log = logging.getLogger(__name__)


class LagMonitor:
    """Asks each source that ``ReportsLag`` in a thread of its own, so that a broker that is slow holds up nothing else.

    Args:
        sources: by name; others than those that ``ReportsLag`` are left alone.
        cursor: the committed position of a source by name, None at the start.
        on_lag: gets the name and how many entries wait; NaN when that is not known.
        interval: seconds between two questions.
    """

    def __init__(
        self,
        sources: Mapping[str, TaskSource | None],
        cursor: Callable[[str], str | None],
        on_lag: Callable[[str, float], None],
        interval: float = INTERVAL_SECONDS,
    ) -> None:
        """Start the threads."""
        self._cursor, self._on_lag, self._interval = cursor, on_lag, interval
        self._closing = threading.Event()
        self._threads = [
            threading.Thread(target=self._poll, args=(name, source), name=f"lag-{name}", daemon=True)
            for name, source in sources.items()
            if isinstance(source, ReportsLag)
        ]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Ask no more; an answer that is still awaited is not waited for."""
        self._closing.set()
        for thread in self._threads:
            thread.join(timeout=0.5)

    def _poll(self, name: str, source: ReportsLag) -> None:
        while not self._closing.is_set():
            try:
                waiting = source.lag(self._cursor(name))
            except Exception as error:  # the reading of the source says what is wrong, and tries again
                _log.debug("the lag of the source %s is not known: %s", name, error)
                waiting = None
            if not self._closing.is_set():
                self._on_lag(name, nan if waiting is None else float(waiting))
            self._closing.wait(self._interval)


ACK_BATCH = 64
"""How many settled arrivals are told to the source together while it has more to give."""


class AckTracker:
    """Gathers what becomes of arrivals, in any thread, and tells the source in the thread that reads it.

    Does nothing for a source that is no ``Acknowledges``. ``sync_dead_letters`` is called before rejected arrivals
    are acked.
    """

    def __init__(self, source: TaskSource, sync_dead_letters: Callable[[], None] = lambda: None) -> None:
        """Begin with nothing to be told."""
        self._sync_dead_letters = sync_dead_letters
        self._source = source if isinstance(source, Acknowledges) else None
        self._answered: queue.SimpleQueue[Arrival | None] = queue.SimpleQueue()  # None: it was not kept
        self._outstanding = 0

    def track(self, arrival: Arrival, future: "Future[Receipt | Conflict]") -> None:
        """Wait for a future that has a result once the arrival is durable, and an exception if it was not kept."""
        if self._source is not None:
            self._outstanding += 1
            without_body = arrival._replace(body=b"")  # so that what waits to be committed is not held twice
            future.add_done_callback(lambda done: self._answered.put(_outcome(without_body, done)))

    def reject(self, arrival: Arrival, rejection: Rejected) -> None:
        """Count an arrival as done with: it will never be kept."""
        if self._source is not None:
            self._outstanding += 1
            self._answered.put(arrival._replace(body=b"", rejection=rejection))

    def flush(self, minimum: int = 1) -> None:
        """Settle all that was answered, if there are at least so many; raises what the source raises."""
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
        """Settle all that is answered within so many seconds; what is not, is read again after the next start."""
        end = time.monotonic() + timeout
        try:
            while self._source is not None and self._outstanding and time.monotonic() < end:
                self._answered.put(self._answered.get(timeout=max(end - time.monotonic(), 0.001)))
                self.flush()
        except queue.Empty:
            pass
        except Exception as error:
            _log.warning("the source %s could not be told what is durable: %s: %s", name, type(error).__name__, error)


def _outcome(arrival: Arrival, done: "Future[Receipt | Conflict]") -> Arrival | None:
    """Return what the source is told of an arrival that was answered, None if it was not kept."""
    if done.exception() is not None:
        return None
    answer = done.result()
    if not isinstance(answer, Conflict):
        return arrival
    rejection = Rejected("conflict", f"the id belongs to round {answer.round}, which was made of other bytes")
    return arrival._replace(rejection=rejection)


IDLE_SECONDS = 0.05
"""How long a source that has nothing now is left alone."""


ACK_DRAIN_SECONDS = 5.0
"""How long the end waits for the last arrivals to be durable, so that the source can be told of them."""


def read_until_closed(
    name: str,
    source: TaskSource,
    submit: Callable[[Arrival], "Future[Receipt | Conflict]"],
    cursor: Callable[[str], str | None],
    closing: threading.Event,
    sync_dead_letters: Callable[[], None] = lambda: None,
) -> None:
    """Submit all that a source yields until ``closing``; reconnect when it fails, with growing, random waits.

    It goes on from the committed cursor each time, so that what was read but not committed is read again and what
    was committed is recognised by its id. A rejected arrival is logged and skipped. A source that
    ``Acknowledges`` gets an ack for each arrival that is durable or rejected.

    Args:
        name: of the source.
        source: what to read.
        submit: validates an arrival, waits for room and queues it.
        cursor: the committed position of a source by name, None at the start.
        closing: set when it is time to end.
        sync_dead_letters: called before rejected arrivals are acked, because the source then forgets them.
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
        reconnect(_read, name, source, submit, cursor, closing, sync_dead_letters)
        closing.wait(0.5)


class _NoArrivalYet(Exception):
    """The source failed before it gave anything, so the next wait is longer."""


def _read(
    name: str,
    source: TaskSource,
    submit: Callable[[Arrival], "Future[Receipt | Conflict]"],
    cursor: Callable[[str], str | None],
    closing: threading.Event,
    sync_dead_letters: Callable[[], None] = lambda: None,
) -> None:
    """Read until ``closing`` or until the source fails; raises only if it failed before it gave an arrival."""
    last: Future[Receipt | Conflict] | None = None
    received_any = False
    arrivals: Iterator[Arrival | None] | None = None
    acks = AckTracker(source, sync_dead_letters)
    try:
        arrivals = source.read(cursor(name))
        for arrival in arrivals:
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
        if not received_any:
            raise _NoArrivalYet(f"{type(error).__name__}: {error}") from error
        _log.warning("the source %s failed and is read again: %s: %s", name, type(error).__name__, error)
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
    """Submit an arrival; return what will have the answer, None if it was rejected."""
    try:
        future = submit(arrival)
    except Rejected as rejection:
        _log.warning("the source %s brought %.80r, rejected: %s", name, arrival.id, rejection)
        acks.reject(arrival, rejection)
        return None
    acks.track(arrival, future)
    future.add_done_callback(lambda done: _log_answer(name, arrival.id, done))
    return future


def _wait_for_answer(last: "Future[Receipt | Conflict] | None", closing: threading.Event) -> None:
    """Wait until all that was queued is answered: read again, it could be cut into tasks otherwise."""
    while last is not None and not last.done() and not closing.wait(IDLE_SECONDS):
        pass


def _log_answer(name: str, id: str, done: "Future[Receipt | Conflict]") -> None:
    error = done.exception()
    if error is not None:
        _log.error("the source %s brought %s, which was not kept: %s", name, id, error)
    elif isinstance(answer := done.result(), Conflict):
        _log.warning("the source %s brought %s again with other bytes; round %d has it", name, id, answer.round)


def _log_failure(name: str, state: RetryCallState) -> None:
    error = state.outcome.exception() if state.outcome is not None else None
    wait = state.next_action.sleep if state.next_action is not None else 0.0
    _log.warning("the source %s cannot be read, trying again in %.1f s: %s", name, wait, error)
