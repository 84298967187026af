"""Ask sources how far behind they are, for as long as the daemon lives."""

import logging
import threading
from collections.abc import Callable, Mapping
from math import nan

from streams.arrivals import ReportsLag, TaskSource

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
