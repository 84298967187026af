"""From which round on which path summed each learner's meta-gradients, written down before it is gone by."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from online_meta.path_finder import MEASURE_AFTER_SECONDS, Autotuner
from online_meta.paths import ExecutionPlan, signature_of
from online_meta.types import Learner, Task
from trainers.json_lines import LineReader, LineWriter
from trainers.settings import EngineSettings

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


class PlanSelector:
    """Lets every learner that sums meta-gradients go by the paths in the book, and looks for better ones."""

    def __init__(
        self,
        learners: Mapping[str, Learner],
        settings: EngineSettings,
        batch: int,
        programs: Path,
        measure_after: float = MEASURE_AFTER_SECONDS,
    ) -> None:
        """Steer those of ``learners`` that have a ``task_sum``; nothing is looked for before ``measure_after`` seconds."""
        self._learners: dict[str, Any] = {n: learner for n, learner in learners.items() if hasattr(learner, "task_sum")}
        make = partial(Autotuner, batching=settings.batching, memory_limit=settings.memory_limit, folder=programs)
        self._tuners = {
            n: make(learner.task_sum, batch, measure_after=measure_after) for n, learner in self._learners.items()
        }

    def find(self, known: ExecutionPlans, tasks: list[Task]) -> ExecutionPlans:
        """Return the paths in ``known``, with better and new ones where there are any by now for tasks like these."""
        found: ExecutionPlans = {}
        for name, tuner in self._tuners.items():
            by_signature = {path.signature: path for path in known.get(name, ())}
            compiled = {path.signature for path in by_signature.values() if path.batching == "compiled"}
            new = [task for task in tasks if signature_of(task) not in compiled]
            by_signature |= {path.signature: path for path in tuner.find(self._learners[name].engine.meta(), new)}
            if by_signature:
                found[name] = tuple(by_signature.values())
        return found

    def follow(self, paths: ExecutionPlans) -> None:
        """Let the learners go by ``paths``."""
        for name, learner in self._learners.items():
            learner.task_sum.follow(paths.get(name, ()))

    def wait(self) -> None:
        """Wait for all that is being compiled."""
        for tuner in self._tuners.values():
            tuner.wait()

    def close(self) -> None:
        """Stop what is being compiled."""
        for tuner in self._tuners.values():
            tuner.close()
