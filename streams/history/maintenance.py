"""Maintain a history in the background while tasks arrive: seal, evict, apply retention and compact."""

import logging
import threading
import time
from collections.abc import Callable

from streams.history import archive_index
from streams.history.archive.stores import is_url
from streams.history.errors import HistoryDamaged
from streams.history.history import History
from streams.history.retention import RetentionSettings, compact, last_decision, subsample
from streams.history.sealing import SealingSettings, evict_payloads, remove_orphans, seal_next

POLL_SECONDS = 1.0
PAUSE_SECONDS = 30.0
"""How long a failed action is paused before the next attempt."""

_log = logging.getLogger(__name__)


def is_due(history: History, sealing: SealingSettings, retention: RetentionSettings) -> bool:
    """Return whether there may be maintenance work to do; the check is cheap."""
    if retention.limited or history.query("SELECT 1 FROM thinned LIMIT 1"):
        return True
    first = archive_index.first_unsealed(history.query)
    sql = "SELECT count(*), sum(bytes) FROM (SELECT bytes FROM rounds WHERE round >= ? LIMIT ?)"
    rounds, size = history.query(sql, (first, sealing.segment_rounds))[0]
    full = rounds == sealing.segment_rounds or (size or 0) >= sealing.segment_bytes
    return full or (first > 0 and archive_index.ledger_bytes(history.query) > sealing.ledger_bytes)


def reach_archive(history: History) -> None:
    """Read a small file of the archive, if the archive is in use; a short request to an object store.

    Raises:
        Exception: if the archive cannot be reached, of a type that depends on the store.
        HistoryDamaged: if the newest segment's marker is missing, as it is when a disk is not mounted.
    """
    newest = "SELECT name FROM segments ORDER BY first DESC LIMIT 1"
    while found := history.query(newest):
        try:
            history.archive.marker(found[0][0])
            return
        except HistoryDamaged:
            if history.query(newest) == found:  # Otherwise retention has just replaced the segment.
                raise
    if is_url(archive_index.read_location(history.query).url or ""):
        history.archive.names()


class Maintenance:
    """A thread that seals rounds, evicts payloads from the ledger, applies retention and compacts the archive.

    Arrivals are durable without it. If the archive is unreachable, damaged or full, the error is logged and the action
    is tried again after ``PAUSE_SECONDS``.

    Args:
        history: opened for writing or for maintenance.
        sealing: how rounds are moved into the archive.
        retention: which rounds are retained.
        oldest: returns the number of rounds that the oldest checkpoint has learned, 0 without a checkpoint.
        report: called after each round of actions with the errors of those that failed last, as text; "" for none.
    """

    def __init__(
        self,
        history: History,
        sealing: SealingSettings,
        retention: RetentionSettings,
        oldest: Callable[[], int],
        report: Callable[[str], None] = lambda errors: None,
    ) -> None:
        """Start the thread, which first removes what a killed writer left behind."""
        self._history, self._sealing, self._retention, self._oldest = history, sealing, retention, oldest
        self._checked_rounds, self._orphans_removed = 0, False
        self._report = report
        self._paused: dict[str, float] = {}
        self._errors: dict[str, str] = {}
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="upkeep", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Finish the segment that is being written, and stop the thread."""
        self._closing.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._closing.is_set():
            busy = self._attempt("sealed", self._seal)
            self._attempt("evicted from the ledger", self._evict)
            self._attempt("discarded", self._subsample)
            self._attempt("removed", self._compact)
            self._report("; ".join(self._errors.values()))
            if not busy:
                self._closing.wait(POLL_SECONDS)

    def _attempt(self, action: str, work: Callable[[], object]) -> bool:
        """Run an action and return whether there was something to do; a failed action is paused."""
        if self._closing.is_set() or time.monotonic() < self._paused.get(action, 0.0):
            return False
        try:
            done = bool(work())
            self._errors.pop(action, None)
        except Exception as error:
            message = f"{type(error).__name__}: {error}"
            _log.error("rounds cannot be %s, trying again in %g s: %s", action, PAUSE_SECONDS, message)
            self._paused[action] = time.monotonic() + PAUSE_SECONDS
            self._errors[action] = f"rounds cannot be {action}: {message}"
            done = False
        return done

    def _seal(self) -> bool:
        if not self._orphans_removed:
            remove_orphans(self._history)
            self._orphans_removed = True
        return seal_next(self._history, self._sealing) is not None

    def _evict(self) -> int:
        return evict_payloads(self._history, self._sealing.ledger_bytes)

    def _subsample(self) -> int:
        """Apply retention whenever the number of retained rounds has grown by a tenth."""
        committed = len(self._history)
        decided = last_decision(self._history.query, committed + 1)
        held = self._history.query("SELECT count(*) FROM held")[0][0] + committed - decided
        if not self._retention.limited or committed - max(decided, self._checked_rounds) < max(1, held // 11):
            return 0
        self._checked_rounds = committed
        return subsample(self._history, self._retention)

    def _compact(self) -> int:
        return compact(self._history, self._oldest(), self._sealing.segment_rounds)
