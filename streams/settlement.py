"""Tell a source which of its arrivals it need not keep any longer."""

import logging
import queue
import time
from collections.abc import Callable
from concurrent.futures import Future

from streams.arrivals import Acknowledges, Arrival, Conflict, Receipt, Rejected, TaskSource

ACK_BATCH = 64
"""How many settled arrivals are told to the source together while it has more to give."""

_log = logging.getLogger(__name__)


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
