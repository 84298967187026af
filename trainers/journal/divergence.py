"""When meta-step after meta-step is not finite: back to a good checkpoint with half the learning rate, or an end."""

from collections.abc import Container, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

from trainers.journal.jsonl import Line, LineReader, LineWriter, find_line
from trainers.journal.round_records import list_steps


class Diverged(RuntimeError):
    """The run cannot go on: its meta-steps are not finite any more."""


class Rollback(NamedTuple):
    """Before round ``round`` is played the leader goes back to what it was after ``back_to`` rounds."""

    round: int
    back_to: int


class RollbackLog:
    """The rollbacks of a run under its settings, in a file beside the history; each is durable before it is made."""

    def __init__(self, path: Path, settings: str) -> None:
        """Open the book at ``path``, creating it if need be; ``settings`` is their fingerprint."""
        self._writer = LineWriter(path)
        self._settings = settings
        lines = [line for line in LineReader(path).refresh() if line["settings"] == self._settings]
        self.rollbacks = [Rollback(line["round"], line["back_to"]) for line in lines]

    def at(self, round: int) -> int | None:
        """Return how many rounds the leader of ``round`` goes back to, None when it goes on as it is."""
        return next((rollback.back_to for rollback in self.rollbacks if rollback.round == round), None)

    def add(self, rollback: Rollback) -> None:
        """Write down a rollback."""
        self._writer.append({**rollback._asdict(), "settings": self._settings})
        self._writer.sync()
        self.rollbacks.append(rollback)

    def before(self, round: int) -> list[Rollback]:
        """Return those of rounds before ``round``."""
        return [rollback for rollback in self.rollbacks if rollback.round < round]

    def needed_checkpoints(self, round: int) -> set[int]:
        """Return the checkpoints that rollbacks of ``round`` and later rounds go back to."""
        return {rollback.back_to for rollback in self.rollbacks if rollback.round >= round and rollback.back_to}

    def close(self) -> None:
        """Close the file."""
        self._writer.close()


@dataclass
class SkipStreak:
    """How many meta-steps in a row were skipped, the round of the first; if one since the last rollback was good."""

    length: int = 0
    first: int = 0
    recovered: bool = False

    def observe(self, line: Line) -> None:
        """Count the meta-steps that a round's line tells of."""
        for step in list_steps(line):
            if step["skipped"] is None:
                self.length, self.recovered = 0, True
            else:
                self.first = self.first if self.length else line["round"]
                self.length += 1

    def reset(self) -> None:
        """Begin to count anew, after a rollback."""
        self.length, self.recovered = 0, False


def read_skip_streak(path: Path, rounds: int, rollbacks: Sequence[Rollback]) -> SkipStreak:
    """Return the streak that the lines of the first ``rounds`` rounds in the file at ``path`` end in.

    Only as many lines are read, from the end, as it takes.
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
    """Return which of the ``saved`` checkpoints a leader that diverged can go back to, the newest first.

    Those since the first skipped step, or between a rollback and what it went back to, are like what diverged. Where
    nothing good has come of a rollback, only older ones than it went back to are left; at last 0, the beginning.
    """
    good = [
        r
        for r in saved
        if r <= streak.first and not any(rollback.back_to < r <= rollback.round for rollback in rollbacks)
    ]
    if rollbacks and not streak.recovered:
        good = [r for r in good if r < rollbacks[-1].back_to]
    return [*sorted(good, reverse=True), 0]
