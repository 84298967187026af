"""Logs of decisions that depend on timing: written before they take effect, followed by restarts and replays."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from online_meta.batching.plan import ExecutionPlan
from trainers.journal.jsonl import LineReader, LineWriter, find_line

ExecutionPlans = dict[str, tuple[ExecutionPlan, ...]]
"""The execution plans of each learner that sums meta-gradients, by its name."""


class ExecutionPlanLog:
    """The log of a run's execution plans, in a file next to the history.

    A change is in the file before the first round that uses it, and durable after ``sync``. Changes that were logged
    under other settings are ignored.

    Args:
        path: of the file, which is created if it does not exist.
        settings: fingerprint of the settings.
        planned: number of rounds that the update log contains.
    """

    def __init__(self, path: Path, settings: str, planned: int) -> None:
        """Open the file and read its changes."""
        self._writer = LineWriter(path)
        self._settings = settings
        lines = [line for line in LineReader(path).refresh() if line["settings"] == self._settings]
        self._changes = [(line["round"], execution_plans_from_json(line["paths"])) for line in lines]
        # Updates that were logged before the first line under these settings were made under other settings.
        self._bound_rounds = range(lines[0]["free"] if lines else planned, planned)
        if not lines:
            self._changes.append((0, {}))
            self._write(0, {}, free=planned)

    def is_bound(self, round: int) -> bool:
        """Return whether an update with ``round`` was logged under these settings, so that its plans are fixed."""
        return round in self._bound_rounds

    def at(self, round: int) -> ExecutionPlans:
        """Return the plans of ``round``: those of the last change at this or an earlier round."""
        return next((paths for first, paths in reversed(self._changes) if first <= round), {})

    def record(self, round: int, paths: ExecutionPlans) -> None:
        """Log ``paths`` as the plans from ``round`` on; they replace changes at later rounds that were never played."""
        if self.at(round) == paths and all(first <= round for first, _ in self._changes):
            return
        self._changes.append((round, dict(paths)))
        self._write(round, paths)

    def _write(self, round: int, paths: ExecutionPlans, **extra: int) -> None:
        self._writer.append(
            {"round": round, "settings": self._settings, "paths": execution_plans_to_json(paths), **extra}
        )

    def sync(self) -> None:
        """Make all changes durable."""
        self._writer.sync()

    def close(self) -> None:
        """Close the file."""
        self._writer.close()


def read_execution_plans(path: Path) -> ExecutionPlans:
    """Return the newest plans in a log; none if it does not exist."""
    lines = list(LineReader(path).lines())
    return execution_plans_from_json(lines[-1]["paths"]) if lines else {}


def execution_plans_to_json(paths: ExecutionPlans) -> dict[str, list[list[Any]]]:
    """Return execution plans as a JSON value."""
    return {
        name: [[*path[:4], *([[*path.pad]] if path.pad else [])] for path in found] for name, found in paths.items()
    }


def execution_plans_from_json(paths: Mapping[str, list[list[Any]]]) -> ExecutionPlans:
    """Return the execution plans that ``execution_plans_to_json`` encoded."""
    return {
        name: tuple(ExecutionPlan(*path[:4], *map(tuple, path[4:])) for path in found) for name, found in paths.items()
    }


class UpdatePlan(NamedTuple):
    """One meta-update: ``rounds`` rounds from ``round`` on are scored with the same leader, then learned together.

    With ``rounds`` = 0 it is an update on past rounds only, before ``round`` is played.
    """

    round: int
    rounds: int


class UpdateLog:
    """The log of a run's updates, in a file next to the history; each is there before it is played.

    ``sync`` makes them durable. A power loss before it may lose updates, which nothing outside the process has seen.

    Args:
        path: of the file, which is created if it does not exist.
        first_round: first round to be played; earlier updates are not read.
    """

    def __init__(self, path: Path, first_round: int = 0) -> None:
        """Open the file and read the updates from ``first_round`` on."""
        position = find_line(path, lambda line: bool(line["round"] >= first_round))
        self._writer = LineWriter(path, position)
        self._first_round = first_round
        plans = read_plans(path, position)
        self._plans = {plan.round: plan for plan in plans if plan.rounds}
        self._idle_updates = Counter(plan.round for plan in plans if not plan.rounds)
        self.last: UpdatePlan | None = max(self._plans.values(), default=None)
        """The last update that was logged before, from ``first_round`` on; None if there is none."""

    def choose_rounds(self, round: int, available: int, max_rounds: int) -> UpdatePlan:
        """Return the update that starts at ``round``: the logged one, or a new one, which is then logged.

        Args:
            round: next round to play.
            available: number of committed rounds from ``round`` on; a new update contains all of them.
            max_rounds: largest number of rounds in a new update.
        """
        if round not in self._plans:
            plan = UpdatePlan(round, max(1, min(available, max_rounds)))
            self._write(plan)
            return plan
        return self._plans.pop(round)

    def amend(self, round: int, rounds: int) -> None:
        """Log that the update from ``round`` on has only ``rounds`` rounds, in place of what was logged before."""
        self._plans[round] = UpdatePlan(round, rounds)
        self._write(self._plans[round])

    def add_idle_update(self, round: int) -> None:
        """Log one more update on past rounds before ``round``."""
        self._write(UpdatePlan(round, 0))
        self._idle_updates[round] += 1

    def idle_updates(self, round: int) -> int:
        """Return the number of logged updates on past rounds before ``round``."""
        return self._idle_updates[round]

    def is_planned(self, round: int) -> bool:
        """Return whether an update with ``round`` is logged, so that no idle update may be added before it."""
        return round < self.end

    def _write(self, plan: UpdatePlan) -> None:
        self._writer.append(plan._asdict())

    def sync(self) -> None:
        """Make all logged updates durable."""
        self._writer.sync()

    @property
    def end(self) -> int:
        """The first round that no logged update contains."""
        return max((plan.round + plan.rounds for plan in self._plans.values()), default=self._first_round)

    def close(self) -> None:
        """Close the file."""
        self._writer.close()


def read_plans(path: Path, position: int = 0) -> list[UpdatePlan]:
    """Return the updates in a file; none if it does not exist.

    Args:
        path: of the file.
        position: where to start, in bytes.
    """
    return [UpdatePlan(line["round"], line["rounds"]) for line in LineReader(path, position).lines()]
