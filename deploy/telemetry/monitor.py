"""Observe a running daemon: collect the facts that its health is computed from, and kill children that hang."""

import contextlib
import logging
import os
import shutil
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol, TypedDict

from deploy.config.config import Config
from deploy.telemetry.facts import WINDOW_ROUNDS, Facts, ProcessFacts, SourceFacts, WindowFacts
from deploy.telemetry.health import Check
from deploy.telemetry.process_monitor import PROCESSES, ProcessMonitor, is_descendant
from deploy.telemetry.run_view import LOSS_BEFORE, QUARANTINED, SKIPPED, SKIPPED_STEPS, STEPS, RunView
from online_meta.regret.ledger import charged_column
from streams.history.history import History
from streams.ingest.ingest import Ingest
from streams.types import ReportsLag, TaskSource
from trainers.journal.heartbeat import REPLAYING, is_disk_full
from trainers.journal.jsonl import LineReader
from trainers.journal.run_files import RunFiles

MAX_STEP_SECONDS = 1.0
"""A pause of the daemon itself, such as that of a suspended machine, counts as no more than this."""
HANG_TIMEOUTS, HANG_ROUNDS = 2.0, 20.0
"""A silent process that uses no processor time is killed after this many ``engine.timeout_seconds``, and not before
this many times its longest silence."""
BUSY_FACTOR = 10.0
"""A silent process that computes is killed after this many times as long, and twice that after each kill in vain."""
ARCHIVE_POLL_SECONDS = 10.0
PROBE_BYTES = 1 << 16
PROBE_SECONDS = 5.0
PACE_SECONDS = 60.0
SETTLED_SECONDS = 30.0
DEATHS_SECONDS = 600.0
log = logging.getLogger(__name__)


class CalibrationFacts(TypedDict, total=False):
    """The fields of ``WindowFacts`` about calibration."""

    targets: int
    coverage: float | None
    calibration_error: float | None


class ArchiveMonitor:
    """A thread that asks the archive at intervals whether it can be reached.

    Args:
        reach: raises an exception if the archive cannot be reached.
        clock: returns seconds.
        interval: seconds between two requests.
    """

    def __init__(
        self,
        reach: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
        interval: float = ARCHIVE_POLL_SECONDS,
    ) -> None:
        """Start the thread."""
        self._reach, self._clock, self._interval = reach, clock, interval
        self._error, self._asked = "", 0.0
        self._waiting = False
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="archive-probe", daemon=True)
        self._thread.start()

    def state(self) -> tuple[str, float]:
        """Return the error of the last request, and the seconds for which a request has waited."""
        return self._error, self._clock() - self._asked if self._waiting else 0.0

    def close(self) -> None:
        """Stop, without waiting for a request in progress."""
        self._closing.set()
        self._thread.join(timeout=0.5)

    def _run(self) -> None:
        while not self._closing.is_set():
            self._asked, self._waiting = self._clock(), True
            try:
                self._reach()
                self._error = ""
            except Exception as error:
                self._error = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            self._waiting = False
            self._closing.wait(self._interval)


@dataclass
class Pace:
    """Measures how long rounds take while tasks wait, usually and in the last minute."""

    busy_seconds: float = 0.0
    busy_rounds: int = 0

    def __post_init__(self) -> None:
        """Start without a measurement."""
        self._marks: deque[tuple[float, int]] = deque()

    def note(self, elapsed: float, rounds: int, busy: bool) -> None:
        """Count ``elapsed`` seconds and the new ``rounds`` in them, if the trainer was ``busy`` all the time."""
        if not busy:
            self._marks.clear()
            return
        self.busy_seconds, self.busy_rounds = self.busy_seconds + elapsed, self.busy_rounds + rounds
        self._marks.append((self.busy_seconds, self.busy_rounds))
        while self.busy_seconds - self._marks[0][0] > PACE_SECONDS:
            self._marks.popleft()

    def usual(self) -> float | None:
        """Return the seconds a round, before the last minute of this busy time; None with fewer than 20 rounds."""
        first = self._marks[0] if self._marks else (self.busy_seconds, self.busy_rounds)
        return first[0] / first[1] if first[1] >= 20 else None

    def recent(self) -> float | None:
        """Return the seconds a round in the last minute; None if the trainer was not busy for that long."""
        if not self._marks or self.busy_seconds - self._marks[0][0] < 0.9 * PACE_SECONDS:
            return None
        return (self.busy_seconds - self._marks[0][0]) / max(self.busy_rounds - self._marks[0][1], 1)


class Observed(Protocol):
    """What a ``HealthMonitor`` reads of the daemon."""

    config: Config
    files: RunFiles
    history: History
    ingest: Ingest
    view: RunView
    draining: bool
    started: float

    def pending(self) -> int:
        """Return the number of tasks that wait to be learned."""


class HealthMonitor:
    """Collects the facts about a daemon; ``look`` is called by one thread, a few times a second.

    Args:
        daemon: to observe.
        processes: monitors of its children by name; see ``PROCESSES``.
        sources: the sources by name; None for those that clients push to.
        archive: asks whether the archive can be reached.
        clock: returns seconds.
        now: returns the Unix time in seconds.
        forks: returns the facts about the processes of forks by name, a number of seconds after the last look.
    """

    def __init__(
        self,
        daemon: Observed,
        processes: Mapping[str, ProcessMonitor],
        sources: Mapping[str, TaskSource | None],
        archive: ArchiveMonitor | None,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], float] = time.time,
        forks: Callable[[float], tuple[tuple[str, ProcessFacts], ...]] = lambda _: (),
    ) -> None:
        """Start without facts."""
        self._look_at_forks = forks
        self._daemon, self._processes, self._sources, self._archive = daemon, processes, sources, archive
        self._clock, self._now = clock, now
        self._looked = clock()
        self._rollbacks, self._rollback_rounds = LineReader(daemon.files.rollback_log), list[int]()
        self._source_ages: dict[str, tuple[float | None, float, float]] = {}
        self._pace = Pace()
        self._rounds = daemon.view.learned()
        self._last, self._last_rounds = WindowFacts(), -1
        self._stalled, self._replayed = 0.0, 0
        self._deaths, self._deaths_age, self._settled = 0, 0.0, 0.0
        self._restarts = 0
        self._refused: tuple[Exception | None, float, bool] = (None, 0.0, False)
        self._kills_in_vain = 0

    def look(self) -> Facts:
        """Return the facts now."""
        elapsed = min(self._clock() - self._looked, MAX_STEP_SECONDS)
        self._looked = self._clock()
        daemon, view = self._daemon, self._daemon.view
        found = {
            name: self._processes[name].look(elapsed) if name in self._processes else NO_PROCESS for name in PROCESSES
        }
        rounds, pending = view.learned(), daemon.pending()
        self._note_progress(found["trainer"], rounds, pending, elapsed)
        self._note_deaths(found["trainer"], rounds, pending, elapsed)
        self._rounds = rounds
        usage = shutil.disk_usage(daemon.files.folder)
        archive_error, archive_seconds = self._archive.state() if self._archive else ("", 0.0)
        checkpoint, regret = view.checkpoint, daemon.config.regret
        return Facts(
            draining=daemon.draining,
            trainer=found["trainer"],
            comparators=found["comparators"],
            maintenance=found["maintenance"],
            pending=pending,
            backlog_limit=daemon.config.serve.limits.backlog,
            rounds=rounds,
            stalled_seconds=self._stalled,
            usual_seconds=self._pace.usual(),
            recent_seconds=self._pace.recent(),
            deaths=self._deaths,
            free_bytes=usage.free,
            total_bytes=usage.total,
            commit_error=self._find_commit_error(elapsed),
            takes_http=any(source.kind == "http" for source in daemon.config.source),
            sources=self._look_at_sources(elapsed),
            published=daemon.files.leader.exists(),
            compared=self._count_compared() if regret.comparator else None,
            compared_every=regret.every_rounds,
            checkpoint_round=checkpoint["round"] if checkpoint else 0,
            checkpoint_seconds=self._now() - (checkpoint["timestamp"] if checkpoint else daemon.started),
            checkpoint_every=daemon.config.checkpoint.every_rounds,
            forks=self._look_at_forks(elapsed),
            archive_error=archive_error,
            archive_seconds=archive_seconds,
            last=self._sum_last(rounds),
        )

    def kill_hung(self, facts: Facts, checks: tuple[Check, ...]) -> None:
        """Kill each child whose check is not ok and that has been silent for too long; its supervisor restarts it."""
        levels = {check.name: check.level for check in checks}
        limit = HANG_TIMEOUTS * self._daemon.config.engine.timeout_seconds
        for name, process in (
            ("trainer", facts.trainer),
            ("comparators", facts.comparators),
            ("maintenance", facts.maintenance),
        ):
            idle = max(limit, HANG_ROUNDS * process.longest)
            busy = idle * BUSY_FACTOR * 2**self._kills_in_vain
            hangs = process.idle_seconds > idle or process.silent_seconds > busy
            if name in self._processes and process.reported and hangs and levels[name] != "ok":
                self._kills_in_vain += 1
                pid = self._processes[name].pid
                log.error("the %s (pid %d) has not reported for %.0f s; killing it", name, pid, process.silent_seconds)
                if is_descendant(pid):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)

    def _note_progress(self, trainer: ProcessFacts, rounds: int, pending: int, elapsed: float) -> None:
        """Measure the pace, and for how long tasks wait without progress although the trainer runs."""
        replayed = trainer.first if trainer.phase == REPLAYING else 0
        moved = rounds > self._rounds or (trainer.phase == REPLAYING and replayed != self._replayed)
        self._replayed = replayed
        works = trainer.alive and trainer.reported and not trainer.suspended
        busy = bool(pending) and works and trainer.phase != REPLAYING
        self._pace.note(elapsed, max(rounds - self._rounds, 0), busy)
        self._stalled = self._stalled + elapsed if pending and works and not moved else 0.0
        if rounds > self._rounds:
            self._kills_in_vain = 0

    def _note_deaths(self, trainer: ProcessFacts, rounds: int, pending: int, elapsed: float) -> None:
        """Count the ends of the trainer in a row without a new round, or a calm time without tasks, between them."""
        self._deaths_age += elapsed
        calm = trainer.alive and trainer.reported and not pending
        self._settled = self._settled + elapsed if calm else 0.0
        if rounds > self._rounds or self._settled > SETTLED_SECONDS or self._deaths_age > DEATHS_SECONDS:
            self._deaths = 0
        ended, self._restarts = trainer.restarts - self._restarts, trainer.restarts
        if ended > 0 and trainer.cause is None:
            self._deaths, self._deaths_age = self._deaths + ended, 0.0

    def _find_commit_error(self, elapsed: float) -> str:
        """Return the error of the last commit; after one for lack of space, try whether it is over."""
        error = self._daemon.ingest.commit_error()
        if error is None:
            return ""
        if self._refused[0] is not error:
            self._refused = (error, 0.0, False)
        known, age, is_over = self._refused
        age += elapsed
        if is_disk_full(error) and not is_over and age > PROBE_SECONDS:
            age, is_over = 0.0, self._can_write()
        self._refused = (known, age, is_over)
        return "" if is_over else f"the last tasks could not be stored: {error}"

    def _can_write(self) -> bool:
        probe = self._daemon.files.folder / ".probe"
        try:
            with open(probe, "wb") as file:
                file.write(bytes(PROBE_BYTES))
                file.flush()
                os.fsync(file.fileno())
            return True
        except OSError:
            return False
        finally:
            with contextlib.suppress(OSError):
                probe.unlink(missing_ok=True)

    def _look_at_sources(self, elapsed: float) -> tuple[SourceFacts, ...]:
        states, found = self._daemon.ingest.source_states.states(), []
        for name, source in self._sources.items():
            if source is None:
                continue
            state = states.get(name)
            answered = state.answered if state else None
            before, silent, failing = self._source_ages.get(name, (None, 0.0, 0.0))
            silent = silent + elapsed if answered == before else 0.0
            failing = failing + elapsed if state and state.failing_since is not None else 0.0
            self._source_ages[name] = (answered, silent, failing)
            error = state.errors[0][1] if state and state.errors else ""
            known = silent if isinstance(source, ReportsLag) else None
            lost = f"its broker deleted {state.lost_entries} entries unread" if state and state.gaps else ""
            found.append(SourceFacts(name, error, failing, known, answered is not None, lost))
        return tuple(found)

    def _count_compared(self) -> int:
        """Return the rounds that the oldest comparison of a configured comparator covers."""
        newest = {one.kind: one.as_of_round for one in self._daemon.view.comparators}
        return min(newest.get(kind, 0) for kind in self._daemon.config.regret.comparator)

    def _sum_last(self, rounds: int) -> WindowFacts:
        for line in self._rollbacks.lines():
            self._rollback_rounds.append(line["round"])
        recent = sum(round > rounds - WINDOW_ROUNDS for round in self._rollback_rounds)
        if rounds != self._last_rounds:
            last, leader = self._daemon.view.last_100(), self._daemon.view.ledger.leader
            self._last_rounds = rounds
            self._last = WindowFacts(
                min(rounds, WINDOW_ROUNDS),
                last[SKIPPED],
                last[STEPS],
                last[SKIPPED_STEPS],
                last[LOSS_BEFORE],
                last[leader],
                quarantined=last[QUARANTINED],
                charged=last[charged_column(leader)],
                **find_calibration(self._daemon.view, last),
            )
        return replace(self._last, rollbacks=recent)


def find_calibration(view: RunView, last: Mapping[str, float]) -> CalibrationFacts:
    """Return how the answers that are judged were calibrated: those of the pool, or without one the leader's."""
    if not view.calibration.bins:
        return {}
    found = view.calibration.measure(view.pool.pool or view.ledger.leader, last)
    if found.coverage is None:
        return {"targets": found.targets, "calibration_error": found.error}
    return {"targets": found.targets, "coverage": found.coverage[0.9]}


NO_PROCESS = ProcessFacts(needed=False)
