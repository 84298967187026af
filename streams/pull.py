"""Read a source for as long as the daemon lives, whatever happens to the source."""

import logging
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future

from tenacity import RetryCallState, Retrying, sleep_using_event, stop_when_event_set, wait_random_exponential
from tenacity.retry import retry_if_exception_type

from streams.arrivals import Arrival, Conflict, IngestClosed, Receipt, Rejected, TaskSource
from streams.settlement import ACK_BATCH, AckTracker

IDLE_SECONDS = 0.05
"""How long a source that has nothing now is left alone."""
ACK_DRAIN_SECONDS = 5.0
"""How long the end waits for the last arrivals to be durable, so that the source can be told of them."""

_log = logging.getLogger(__name__)


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
