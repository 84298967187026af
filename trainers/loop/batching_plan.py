"""From which round on which path summed each learner's meta-gradients, written down before it is gone by."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from online_meta.batching.autotune import MEASURE_AFTER_SECONDS, Autotuner
from online_meta.batching.plan import signature_of
from online_meta.types import Learner, Task
from trainers.journal.plans import ExecutionPlans
from trainers.settings import EngineSettings


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
        """Plan for the ``learners`` that have a ``task_sum``; measure nothing before ``measure_after`` seconds."""
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
