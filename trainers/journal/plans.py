"""What timing decided, written down before it is played and obeyed ever after."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from online_meta.batching.plan import ExecutionPlan
from trainers.journal.jsonl import LineReader, LineWriter, find_line

ExecutionPlans = dict[str, tuple[ExecutionPlan, ...]]
"""The paths of each learner that sums meta-gradients, by its name."""


class ExecutionPlanLog:
    """The paths of a run in a file beside the history; a change is durable before the round that it begins with.

    A history that is played again by other ``settings`` has nothing to do with what was written for these.
    """

    def __init__(self, path: Path, settings: str, planned: int) -> None:
        """Open the book at ``path``; creates it if need be. Rounds below ``planned`` are in the book of plans.

        ``settings`` is their fingerprint.
        """
        self._writer = LineWriter(path)
        self._settings = settings
        lines = [line for line in LineReader(path).refresh() if line["settings"] == self._settings]
        self._changes = [(line["round"], execution_plans_from_json(line["paths"])) for line in lines]
        # Plans that were there before the first line under these settings were made under others.
        self._bound_rounds = range(lines[0]["free"] if lines else planned, planned)
        if not lines:
            self._changes.append((0, {}))
            self._write(0, {}, free=planned)

    def is_bound(self, round: int) -> bool:
        """Return whether a round was planned under these settings: it is played by the paths in the book."""
        return round in self._bound_rounds

    def at(self, round: int) -> ExecutionPlans:
        """Return the paths of ``round``: those of the last change written for it or a round before."""
        return next((paths for first, paths in reversed(self._changes) if first <= round), {})

    def record(self, round: int, paths: ExecutionPlans) -> None:
        """Go by ``paths`` from ``round`` on, whatever was written for later rounds that were never played."""
        if self.at(round) == paths and all(first <= round for first, _ in self._changes):
            return
        self._changes.append((round, dict(paths)))
        self._write(round, paths)

    def _write(self, round: int, paths: ExecutionPlans, **extra: int) -> None:
        self._writer.append(
            {"round": round, "settings": self._settings, "paths": execution_plans_to_json(paths), **extra}
        )
        self._writer.sync()

    def close(self) -> None:
        """Close the file."""
        self._writer.close()


def execution_plans_to_json(paths: ExecutionPlans) -> dict[str, list[list[Any]]]:
    """Return paths as JSON has them."""
    return {name: [list(path) for path in found] for name, found in paths.items()}


def execution_plans_from_json(paths: Mapping[str, list[list[Any]]]) -> ExecutionPlans:
    """Return paths that ``execution_plans_to_json`` told."""
    return {name: tuple(ExecutionPlan(*path) for path in found) for name, found in paths.items()}


class UpdatePlan(NamedTuple):
    """One meta-update: the ``rounds`` rounds from ``round`` on are scored with the same leader, then learned.

    Of no rounds, it is one on past rounds alone, before ``round`` is there.
    """

    round: int
    rounds: int


class UpdateLog:
    """The plans of a run in order, in a file beside the history; each is durable before it is played."""

    def __init__(self, path: Path, first_round: int = 0) -> None:
        """Open the book at ``path``, creating it if need be, for the rounds ``first_round`` that one on."""
        position = find_line(path, lambda line: bool(line["round"] >= first_round))
        self._writer = LineWriter(path, position)
        self._first_round = first_round
        plans = read_plans(path, position)
        self._plans = {plan.round: plan for plan in plans if plan.rounds}
        self._idle_updates = Counter(plan.round for plan in plans if not plan.rounds)

    def choose_rounds(self, round: int, available: int, max_rounds: int) -> UpdatePlan:
        """Return the plan of ``round``: the one in the book, or a new one for what is ``available`` now.

        A new plan shares one update among all ``available`` rounds, ``max_rounds`` at the most.
        """
        if round not in self._plans:
            plan = UpdatePlan(round, max(1, min(available, max_rounds)))
            self._write(plan)
            return plan
        return self._plans.pop(round)

    def add_idle_update(self, round: int) -> None:
        """Write down that one more update on past rounds is made before ``round``."""
        self._write(UpdatePlan(round, 0))
        self._idle_updates[round] += 1

    def idle_updates(self, round: int) -> int:
        """Return how many updates on past rounds are made before ``round``."""
        return self._idle_updates[round]

    def is_planned(self, round: int) -> bool:
        """Return whether ``round`` is planned: what comes before it can't be changed any more."""
        return round < self.end

    def _write(self, plan: UpdatePlan) -> None:
        self._writer.append(plan._asdict())
        self._writer.sync()

    @property
    def end(self) -> int:
        """Up to which round there are plans."""
        return max((plan.round + plan.rounds for plan in self._plans.values()), default=self._first_round)

    def close(self) -> None:
        """Close the file."""
        self._writer.close()


def read_plans(path: Path, position: int = 0) -> list[UpdatePlan]:
    """Return the plans in the file at ``path`` from a ``position`` in bytes on; none when there is no file."""
    return [UpdatePlan(line["round"], line["rounds"]) for line in LineReader(path, position).lines()]
