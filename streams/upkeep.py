"""What a history needs while it is written: sealing, relief, retention, beside ingest."""

import logging
import threading
import time
from collections.abc import Callable

from streams import sealed
from streams.history import History
from streams.retention import RetentionSettings, last_decision, thin
from streams.sealing import SealingSettings, relieve_ledger, seal_next, tidy
from streams.sweeping import sweep

POLL_SECONDS = 1.0
PAUSE_SECONDS = 30.0
"""How long a piece of work that failed is left alone."""

_log = logging.getLogger(__name__)


def is_due(history: History, sealing: SealingSettings, retention: RetentionSettings) -> bool:
    """Return whether there may be something to seal, to relieve, to thin out or to remove; it asks little."""
    if retention.limited or history.ask("SELECT 1 FROM thinned LIMIT 1"):
        return True
    first = sealed.count_sealed(history.ask)
    question = "SELECT count(*), sum(bytes) FROM (SELECT bytes FROM rounds WHERE round >= ? LIMIT ?)"
    rounds, size = history.ask(question, (first, sealing.segment_rounds))[0]
    full = rounds == sealing.segment_rounds or (size or 0) >= sealing.segment_bytes
    return full or (first > 0 and sealed.ledger_bytes(history.ask) > sealing.ledger_bytes)


class Upkeep:
    """Seals rounds and thins them out in a thread of its own.

    Arrivals are durable without: an archive that is away, damaged or full is told of and waited for.

    Args:
        history: open to write, or opened beside its writer.
        sealing: how rounds go into the archive.
        retention: which stay.
        oldest: how many rounds the oldest checkpoint has learned, 0 without one.
    """

    def __init__(
        self, history: History, sealing: SealingSettings, retention: RetentionSettings, oldest: Callable[[], int]
    ) -> None:
        """Begin: what a writer that was killed left behind goes first."""
        self._history, self._sealing, self._retention, self._oldest = history, sealing, retention, oldest
        self._looked, self._tidied = 0, False
        self._paused: dict[str, float] = {}
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="upkeep", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Finish the segment that is being written, and end the thread."""
        self._closing.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._closing.is_set():
            busy = self._try("sealed", self._seal)
            self._try("taken out of the ledger", self._relieve)
            self._try("thinned out", self._thin)
            self._try("removed", self._sweep)
            if not busy:
                self._closing.wait(POLL_SECONDS)

    def _try(self, what: str, work: Callable[[], object]) -> bool:
        """Do a piece of work, and return whether there was something to do; one that failed is left alone a while."""
        if self._closing.is_set() or time.monotonic() < self._paused.get(what, 0.0):
            return False
        try:
            return bool(work())
        except Exception as error:
            told = f"{type(error).__name__}: {error}"
            _log.error("rounds cannot be %s; again in %g s: %s", what, PAUSE_SECONDS, told)
            self._paused[what] = time.monotonic() + PAUSE_SECONDS
            return False

    def _seal(self) -> bool:
        if not self._tidied:
            tidy(self._history)
            self._tidied = True
        return seal_next(self._history, self._sealing) is not None

    def _relieve(self) -> int:
        return relieve_ledger(self._history, self._sealing.ledger_bytes)

    def _thin(self) -> int:
        """Look whether there is too much whenever a tenth more rounds have come."""
        committed = len(self._history)
        decided = last_decision(self._history.ask, committed + 1)
        held = self._history.ask("SELECT count(*) FROM held")[0][0] + committed - decided
        if not self._retention.limited or committed - max(decided, self._looked) < max(1, held // 11):
            return 0
        self._looked = committed
        return thin(self._history, self._retention)

    def _sweep(self) -> int:
        return sweep(self._history, self._oldest(), self._sealing.segment_rounds)
