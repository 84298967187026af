"""Detect divergence (a streak of non-finite meta-steps), and log the rollbacks that recover from it."""

from collections.abc import Container, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

from trainers.journal.jsonl import Line, LineReader, LineWriter, find_line
from trainers.journal.round_records import list_steps


class Diverged(RuntimeError):
    """The run cannot continue because its meta-steps are no longer finite."""


class Rollback(NamedTuple):
    """A rollback of the leader, before round ``round``, to its state after ``back_to`` rounds."""

    round: int
    back_to: int


class RollbackLog:
    """The log of a run's rollbacks, in a file next to the history; each is durable before it takes effect.

    Args:
        path: of the file, which is created if it does not exist.
        settings: fingerprint of the settings; rollbacks under other settings are ignored.
    """

    def __init__(self, path: Path, settings: str) -> None:
        """Open the file and read its rollbacks."""
        self._writer = LineWriter(path)
        self._settings = settings
        lines = [line for line in LineReader(path).refresh() if line["settings"] == self._settings]
        self.rollbacks = [Rollback(line["round"], line["back_to"]) for line in lines]

    def at(self, round: int) -> int | None:
        """Return the round to which the leader rolls back before ``round``; None for no rollback."""
        return next((rollback.back_to for rollback in self.rollbacks if rollback.round == round), None)

    def add(self, rollback: Rollback) -> None:
        """Append a rollback, durably."""
        self._writer.append({**rollback._asdict(), "settings": self._settings})
        self._writer.sync()
        self.rollbacks.append(rollback)

    def before(self, round: int) -> list[Rollback]:
        """Return the rollbacks before earlier rounds than ``round``."""
        return [rollback for rollback in self.rollbacks if rollback.round < round]

    def needed_checkpoints(self, round: int) -> set[int]:
        """Return the checkpoints to which rollbacks at ``round`` and later rounds go."""
        return {rollback.back_to for rollback in self.rollbacks if rollback.round >= round and rollback.back_to}

    def close(self) -> None:
        """Close the file."""
        self._writer.close()


@dataclass
class SkipStreak:
    """A streak of skipped meta-steps.

    Attributes:
        length: number of meta-steps in a row that were skipped.
        first: round of the first of them.
        recovered: whether a meta-step since the last rollback was not skipped.
    """

    length: int = 0
    first: int = 0
    recovered: bool = False

    def observe(self, line: Line) -> None:
        """Count the meta-steps in the line of a round."""
        for step in list_steps(line):
            if step["skipped"] is None:
                self.length, self.recovered = 0, True
            else:
                self.first = self.first if self.length else line["round"]
                self.length += 1

    def reset(self) -> None:
        """Restart the count after a rollback."""
        self.length, self.recovered = 0, False


def read_skip_streak(path: Path, rounds: int, rollbacks: Sequence[Rollback]) -> SkipStreak:
    """Return the streak of skipped meta-steps at the end of the first rounds; only the necessary lines are read.

    Args:
        path: of the file of round records.
        rounds: number of rounds to consider.
        rollbacks: before these rounds.
    """
    window = 64
    ended = max((rollback.round for rollback in rollbacks), default=0)
    while True:
        first = max(rounds - window, 0)
        reader = LineReader(path, find_line(path, lambda line, first=first: bool(line["round"] >= first)))  # type: ignore[misc]
        lines = [*takewhile(lambda line: line["round"] < rounds, reader.lines())]
        good = any(step["skipped"] is None for line in lines for step in list_steps(line))
        if good or first <= ended:
            return _count_streak(lines, {rollback.round for rollback in rollbacks})
        window *= 8


def _count_streak(lines: Sequence[Line], rollback_rounds: Container[int]) -> SkipStreak:
    streak = SkipStreak()
    for line in lines:
        if line["round"] in rollback_rounds:
            streak.reset()
        streak.observe(line)
    return streak


def list_rollback_targets(saved: Sequence[int], streak: SkipStreak, rollbacks: Sequence[Rollback]) -> list[int]:
    """Return the checkpoints to which a diverged leader can roll back, newest first, and at the end 0, the beginning.

    Checkpoints after the first skipped step are excluded, as are those between an earlier rollback and its target. If
    no meta-step since the last rollback was good, only checkpoints older than its target remain.

    Args:
        saved: rounds of the existing checkpoints.
        streak: of skipped meta-steps.
        rollbacks: earlier rollbacks.
    """
    good = [
        r
        for r in saved
        if r <= streak.first and not any(rollback.back_to < r <= rollback.round for rollback in rollbacks)
    ]
    if rollbacks and not streak.recovered:
        good = [r for r in good if r < rollbacks[-1].back_to]
    return [*sorted(good, reverse=True), 0]
