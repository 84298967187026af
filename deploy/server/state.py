"""The state of a running daemon, which its HTTP routes and background tasks share."""

import logging
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from threading import Event, Lock
from typing import Any

from prometheus_client import CollectorRegistry

import online_meta
from deploy.config.config import Config
from deploy.leader import Adapter
from deploy.processes.branches import ForkSupervisor, Prepared
from deploy.telemetry.facts import Facts
from deploy.telemetry.health import AREAS, Check, date_checks, judge, list_failing, worst_level
from deploy.telemetry.metrics import Instruments, MetricState
from deploy.telemetry.monitor import HealthMonitor
from deploy.telemetry.prometheus import count_checkpoint, count_quarantine, count_ranks, count_round, update_gauges
from deploy.telemetry.ranks_view import RanksView
from deploy.telemetry.run_view import RunView
from streams.formats.json_body import find_short_example
from streams.history.errors import HistoryError
from streams.history.history import History
from streams.ingest.dead_letters import read_letters
from streams.ingest.ingest import Ingest
from streams.segmenting.by_entity import EntitySource
from streams.types import Arrival, Rejected
from trainers.journal.jsonl import LineWriter
from trainers.journal.quarantine import QUARANTINED, Quarantine
from trainers.journal.run_files import RunFiles

WINDOW_SECONDS = 30.0
log = logging.getLogger(__name__)
STALE_SECONDS = 10.0
"""Checks that are older than this say nothing."""


class RecentRate:
    """The growth of a count per second, over the last ``WINDOW_SECONDS``.

    Args:
        clock: returns the time in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Start without recorded counts."""
        self._clock = clock
        self._marks: deque[tuple[float, int]] = deque()

    def record(self, count: int) -> None:
        """Record the current value of the count."""
        now = self._clock()
        self._marks.append((now, count))
        while len(self._marks) > 2 and now - self._marks[0][0] > WINDOW_SECONDS:
            self._marks.popleft()

    def per_second(self) -> float:
        """Return the growth per second; 0 until two values are recorded."""
        if len(self._marks) < 2:
            return 0.0
        (start_time, first), (now, last) = self._marks[0], self._marks[-1]
        return (last - first) / (now - start_time) if now > start_time else 0.0


@dataclass
class DaemonState:
    """The parts of a running daemon; ``draining`` is set once, when the daemon begins to drain."""

    config: Config
    files: RunFiles
    history: History
    ingest: Ingest
    view: RunView
    registry: CollectorRegistry
    instruments: Instruments
    adapter: Adapter
    trainer_alive: Callable[[], bool]
    ranks_view: RanksView
    broken: Event
    token: str | None
    started: float = field(default_factory=time.time)
    draining: bool = False
    checks: tuple[Check, ...] = ()
    checked: float | None = None
    learned_rate: RecentRate = field(default_factory=RecentRate)
    ingested_rate: RecentRate = field(default_factory=RecentRate)
    refresh_lock: Lock = field(default_factory=Lock)
    observing: Lock = field(default_factory=Lock)
    monitor: HealthMonitor | None = None
    forks: ForkSupervisor | None = None
    tables: Mapping[str, EntitySource] = field(default_factory=dict)
    """The sources whose rows have named columns, by name."""
    quarantined_letters: set[str] | None = None
    """Ids of the quarantined tasks that are dead letters; None until they are needed."""

    def serve_branch(self, prepared: Prepared) -> None:
        """Answer from another branch of the run from now on; a request in progress keeps what it began with."""
        with self.refresh_lock:
            before, self.view = self.view, prepared.view
            self.config, self.files = prepared.settled.config, prepared.settled.files
            self.adapter, self.learned_rate = prepared.adapter, RecentRate()
        before.close()

    def refresh(self) -> None:
        """Read what the trainer has written since the last call, and update the counters; thread-safe."""
        with self.refresh_lock:
            self.view.refresh(
                partial(count_round, self.instruments),
                partial(count_checkpoint, self.instruments),
                self._note_quarantine,
            )
            self.learned_rate.record(self.view.learned())
            self.ingested_rate.record(len(self.history))
            count_ranks(self.instruments, *self.ranks_view.refresh())

    def _note_quarantine(self, quarantine: Quarantine) -> None:
        """Count a quarantined round, and keep its task as a dead letter unless it is kept already."""
        count_quarantine(self.instruments, quarantine)
        entry = self.history.entry(quarantine.round)
        if self.quarantined_letters is None:
            letters = read_letters(self.files.dead_letters)
            self.quarantined_letters = {letter["id"] for _, letter in letters if letter["reason"] == QUARANTINED}
        if entry.id in self.quarantined_letters:
            return
        self.quarantined_letters.add(entry.id)
        if quarantine.reason == "forgotten":
            return
        try:
            body = self.history.payload(quarantine.round)
        except HistoryError as error:
            log.warning("round %d cannot be kept as a dead letter: %s", quarantine.round, error)
            return
        rejection = Rejected(QUARANTINED, f"round {quarantine.round}, {quarantine.reason}: {quarantine.detail}")
        self.ingest.keep(Arrival(entry.id, body, entry.source, None), rejection)

    def request_quarantine(self, round: int, reason: str) -> None:
        """Ask the trainer, durably, to quarantine a round; thread-safe."""
        with self.refresh_lock, closing(LineWriter(self.files.quarantine_requests)) as writer:
            writer.append({"round": round, "reason": reason, "timestamp": time.time()})
            writer.sync()

    def check(self, facts: Facts) -> None:
        """Compute the checks from observed facts; one thread calls this, a few times a second."""
        self.checks = date_checks(self.checks, judge(facts), time.time())
        self.checked = time.monotonic()

    def health(self) -> tuple[Check, ...]:
        """Return the checks; if they are no longer computed, as on a disk that does not answer, "daemon" fails."""
        if self.draining or self.checked is None or time.monotonic() - self.checked > STALE_SECONDS:
            what = "it is draining" if self.draining else "its own state cannot be read"
            stale = Check("daemon", "fail", what, "See the daemon's lines in the log.", AREAS, time.time())
            return (stale, *(check for check in self.checks if check.name != "daemon"))
        return self.checks

    def pending(self) -> int:
        """Return the number of rounds that are durable and not yet learned."""
        return max(len(self.history) - self.view.learned(), 0)

    def oldest_pending_age(self) -> float | None:
        """Return the seconds since the oldest task that is not yet learned arrived; None if there is none."""
        learned = self.view.learned()
        if learned >= len(self.history):
            return None
        return max(time.time() - self.history.entry(learned).arrived, 0.0)

    def update_gauges(self) -> None:
        """Update all gauges."""
        self.refresh()
        size, ranks = self.history.size_bytes(), self.ranks_view.world_size()
        state = MetricState(self.view, self.pending(), self.oldest_pending_age, size, ranks, self.health())
        update_gauges(self.instruments, state)

    def is_trainer_down(self) -> bool:
        """Return whether the trainer has ended or does not respond, and has not come back."""
        return not self.trainer_alive() or any(check.name == "trainer" for check in list_failing(self.checks))

    def phase(self) -> str:
        """Return the daemon's phase: "draining", "trainer_down", "running" or "idle"."""
        if self.draining:
            return "draining"
        if self.is_trainer_down():
            return "trainer_down"
        return "running" if self.pending() else "idle"


def status_of(state: DaemonState) -> dict[str, Any]:
    """Return the answer of ``/v1/status``: phase, rounds, losses, regret, last checkpoint, trainer.

    Before the first task, ``example`` is one in JSON, or None if it is too long to be shown.
    """
    state.refresh()
    view, now = state.view, time.time()
    ingested = len(state.history)
    return {
        "state": state.phase(),
        "version": online_meta.__version__,
        "run": str(Path(state.config.run.path)),
        "started": state.started,
        "now": now,
        "rounds": {
            "ingested": ingested,
            "learned": view.learned() - view.skipped - view.quarantined,
            "skipped": view.skipped,
            "quarantined": view.quarantined,
            "pending": state.pending(),
            "learned_per_second": state.learned_rate.per_second(),
            "ingested_per_second": state.ingested_rate.per_second(),
            "oldest_pending_age_seconds": state.oldest_pending_age(),
        },
        "last": view.last
        and {k: v for k, v in view.last.items() if k not in ("learners", "steps", "more_steps", "efficiency")},
        "leader": view.ledger.leader,
        "learners": view.learners(),
        "regret": view.regret(),
        "verdict": view.verdict(),
        "leaks": view.leaks(),
        "checkpoint": view.checkpoint,
        "trainer": {
            "alive": not state.is_trainer_down(),
            "doing": next((check.evidence for check in state.checks if check.name == "trainer"), "starting"),
            "restarts": state.ranks_view.restarts,
            "world_size": state.ranks_view.world_size(),
            "ranks": state.ranks_view.ranks(),
        },
        "forks": state.forks.describe() if state.forks else None,
        "gaps": _list_gaps(state),
        "omissions": state.ingest.list_omissions(),
        "backlog_limit": state.config.serve.limits.backlog,
        "health": health_of(state),
        **({"example": find_short_example(state.config.task)} if ingested == 0 else {}),
    }


def health_of(state: DaemonState) -> dict[str, Any]:
    """Return the answer of ``/v1/health``: the worst level, and every check."""
    checks = state.health()
    return {"level": worst_level(checks), "checks": [asdict(check) for check in checks]}


def _list_gaps(state: DaemonState) -> dict[str, Any]:
    """Return the gaps of each source whose broker has deleted entries before they were read, since the daemon began."""
    return {
        name: {"gaps": found.gaps, "lost_entries": found.lost_entries, "last": found.last_gap._asdict()}
        for name, found in state.ingest.source_states.states().items()
        if found.last_gap is not None
    }
