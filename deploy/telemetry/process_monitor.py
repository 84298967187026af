"""Follow a child process of the daemon through its heartbeats, its restarts and its processor time."""

import contextlib
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, Protocol

import psutil

from deploy.telemetry.facts import ProcessFacts
from trainers.journal.heartbeat import ENDED, IDLE_SHARE, read_heartbeat, reset_heartbeat
from trainers.journal.run_files import RunFiles

PROCESSES = ("trainer", "comparators", "maintenance")
SAMPLE_SECONDS = 1.0
CAUSE_SECONDS = 30.0
"""How long the cause for which a process has ended counts."""


class Child(Protocol):
    """A supervised process."""

    @property
    def pid(self) -> int:
        """Its process id, or that of the agent that started it."""

    def alive(self) -> bool:
        """Return whether it runs."""


class ProcessSample(NamedTuple):
    """The state of a process: whether a signal has stopped it, and the processor time of it and its children."""

    suspended: bool
    processor_seconds: float


def sample_process(pid: int) -> ProcessSample | None:
    """Return the state of a process; None if there is none."""
    try:
        process = psutil.Process(pid)
        used = process.cpu_times()
        seconds = used.user + used.system + used.children_user + used.children_system
        for child in process.children(recursive=True):
            with contextlib.suppress(psutil.Error):
                seconds += sum(child.cpu_times()[:2])
        return ProcessSample(process.status() == psutil.STATUS_STOPPED, seconds)
    except psutil.Error:
        return None


def is_running(pid: int) -> bool:
    """Return whether there is a process with this id that has not ended."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


class ProcessMonitor:
    """Follows one child through its heartbeats and restarts.

    Args:
        heartbeat: file of the child's heartbeats.
        child: returns the child; None while it is not needed.
        restarts: returns how often it was restarted.
        sample: returns the state of a process.
        running: returns whether a process has not ended.
    """

    def __init__(
        self,
        heartbeat: Path,
        child: Callable[[], Child | None],
        restarts: Callable[[], int],
        sample: Callable[[int], ProcessSample | None] = sample_process,
        running: Callable[[int], bool] = is_running,
    ) -> None:
        """Start without a heartbeat."""
        self._heartbeat, self._child, self._restarts = heartbeat, child, restarts
        self._sample, self._running = sample, running
        self._facts = ProcessFacts(reported=False, first_start=True)
        self._ended_pid: int | None = None
        self._seen = (0, 0)  # process id and count of the last heartbeat
        self._sampled: tuple[float, float] | None = None  # silent seconds and processor time of the last sample
        self._cause_age = 0.0

    @property
    def pid(self) -> int:
        """The process that sent the last heartbeat."""
        return self._seen[0]

    def look(self, elapsed: float) -> ProcessFacts:
        """Return the facts now, ``elapsed`` seconds after the last look."""
        child = self._child()
        if child is None:
            return ProcessFacts(needed=False)
        facts = replace(self._facts, needed=True, alive=child.alive(), seconds=self._facts.seconds + elapsed)
        self._cause_age += elapsed
        if facts.cause is not None and self._cause_age > CAUSE_SECONDS:
            facts = replace(facts, cause=None)
        facts = self._note_end(facts)
        facts = self._note_heartbeat(facts, elapsed)
        self._facts = self._measure_idleness(facts, elapsed)
        return self._facts

    def _note_end(self, facts: ProcessFacts) -> ProcessFacts:
        """Note that the process has ended or was restarted, until its successor sends a heartbeat."""
        restarts = self._restarts()
        if restarts <= facts.restarts and not (facts.reported and not (facts.alive and self._running(self.pid))):
            return facts
        self._ended_pid, self._sampled = self.pid or self._ended_pid, None
        return replace(
            facts,
            reported=False,
            first_start=False,
            restarts=restarts,
            seconds=0.0 if facts.reported else facts.seconds,
            suspended=False,
            silent_seconds=0.0,
            idle_seconds=0.0,
        )

    def _note_heartbeat(self, facts: ProcessFacts, elapsed: float) -> ProcessFacts:
        found = read_heartbeat(self._heartbeat)
        if found is None or (found.pid, found.count) == self._seen:
            return replace(facts, silent_seconds=facts.silent_seconds + elapsed if facts.reported else 0.0)
        self._seen = (found.pid, found.count)
        if found.phase == ENDED:
            self._cause_age = 0.0
            return replace(facts, last_words=found.problem, cause=found.cause)
        if found.pid == self._ended_pid or not (facts.alive and self._running(found.pid)):
            return facts  # It has ended since.
        self._sampled = None
        return replace(
            facts,
            reported=True,
            first_start=False,
            seconds=facts.seconds if facts.reported else 0.0,
            phase=found.phase,
            first=found.first,
            last=found.last,
            problem=found.problem,
            longest=max(facts.longest, found.longest),
            suspended=False,
            silent_seconds=0.0,
            idle_seconds=0.0,
        )

    def _measure_idleness(self, facts: ProcessFacts, elapsed: float) -> ProcessFacts:
        """ProcessSample a silent process from time to time, and measure for how long it has used no processor time."""
        silent = facts.silent_seconds
        if silent < SAMPLE_SECONDS or (self._sampled and silent - self._sampled[0] < SAMPLE_SECONDS):
            return facts
        found = self._sample(self.pid)
        if found is None:
            return facts
        before, self._sampled = self._sampled, (silent, found.processor_seconds)
        idle = 0.0
        if before is not None and found.processor_seconds - before[1] < IDLE_SHARE * (silent - before[0]):
            idle = facts.idle_seconds + silent - before[0]
        return replace(facts, suspended=found.suspended, idle_seconds=idle)


def is_descendant(pid: int) -> bool:
    """Return whether a process was started by this one or by one of its children."""
    try:
        return os.getpid() in {parent.pid for parent in psutil.Process(pid).parents()[:2]}
    except psutil.Error:
        return False


def reset_heartbeats(files: RunFiles) -> None:
    """Make the files of heartbeats, before the processes start; on a full disk they are made later."""
    for name in PROCESSES:
        with contextlib.suppress(OSError):
            reset_heartbeat(files.heartbeat(name))
