"""Tell a source which of its arrivals it need not keep any longer."""

import logging
import queue
import time
from collections.abc import Callable
from concurrent.futures import Future

from streams.arrivals import Arrival, Conflict, Receipt, Rejected, Settles, TaskSource

AT_ONCE = 64
"""How many settled arrivals are told to the source together while it has more to give."""

_log = logging.getLogger(__name__)


class Settlement:
    """Gathers what becomes of arrivals, in any thread, and tells the source in the thread that reads it.

    Does nothing for a source that is no ``Settles``. ``bury`` is called before the source is told of rejected ones.
    """

    def __init__(self, source: TaskSource, bury: Callable[[], None] = lambda: None) -> None:
        """Begin with nothing to be told."""
        self._bury = bury
        self._source = source if isinstance(source, Settles) else None
        self._answered: queue.SimpleQueue[Arrival | None] = queue.SimpleQueue()  # None: it was not kept
        self._outstanding = 0

    def expect(self, arrival: Arrival, future: "Future[Receipt | Conflict]") -> None:
        """Wait for a future that has a result once the arrival is durable, and an exception if it was not kept."""
        if self._source is not None:
            self._outstanding += 1
            bare = arrival._replace(body=b"")  # so that what waits to be committed is not held twice
            future.add_done_callback(lambda done: self._answered.put(_outcome(bare, done)))

    def reject(self, arrival: Arrival, refusal: Rejected) -> None:
        """Count an arrival as done with: it will never be kept."""
        if self._source is not None:
            self._outstanding += 1
            self._answered.put(arrival._replace(body=b"", refused=refusal))

    def tell(self, least: int = 1) -> None:
        """Settle all that was answered, if there are at least so many; raises what the source raises."""
        if self._source is None or self._answered.qsize() < least:
            return
        answered = [self._answered.get() for _ in range(self._answered.qsize())]
        self._outstanding -= len(answered)
        settled = [arrival for arrival in answered if arrival is not None]
        if any(arrival.refused is not None for arrival in settled):
            self._bury()
        if settled:
            self._source.settle(settled)

    def finish(self, name: str, patience: float) -> None:
        """Settle all that is answered within so many seconds; what is not, is read again after the next start."""
        end = time.monotonic() + patience
        try:
            while self._source is not None and self._outstanding and time.monotonic() < end:
                self._answered.put(self._answered.get(timeout=max(end - time.monotonic(), 0.001)))
                self.tell()
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
    refusal = Rejected("conflict", f"the id belongs to round {answer.round}, which was made of other bytes")
    return arrival._replace(refused=refusal)
