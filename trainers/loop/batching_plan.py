"""Select the execution plans with which each learner sums meta-gradients."""

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
    """A selector that sets the execution plans of every learner with a ``task_sum``, and searches for faster ones.

    Args:
        learners: by name.
        settings: [engine] section of the configuration.
        batch: largest number of tasks that one rank sums in a meta-step.
        programs: folder of compiled programs.
        measure_after: seconds of computation before faster plans are measured.
    """

    def __init__(
        self,
        learners: Mapping[str, Learner],
        settings: EngineSettings,
        batch: int,
        programs: Path,
        measure_after: float = MEASURE_AFTER_SECONDS,
    ) -> None:
        """Create one tuner for each learner that has a ``task_sum``."""
        self._learners: dict[str, Any] = {n: learner for n, learner in learners.items() if hasattr(learner, "task_sum")}
        make = partial(Autotuner, batching=settings.batching, memory_limit=settings.memory_limit, folder=programs)
        self._tuners = {
            n: make(learner.task_sum, batch, measure_after=measure_after) for n, learner in self._learners.items()
        }

    def find(self, known: ExecutionPlans, tasks: list[Task]) -> ExecutionPlans:
        """Return the plans in ``known``, with new and faster plans that are available by now.

        Args:
            known: present plans.
            tasks: tasks for whose shapes plans are searched.
        """
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
        """Set the execution plans of the learners."""
        for name, learner in self._learners.items():
            learner.task_sum.follow(paths.get(name, ()))

    def is_compiling(self) -> bool:
        """Return whether a program is being compiled in the background."""
        return any(tuner.is_compiling() for tuner in self._tuners.values())

    def wait(self) -> None:
        """Wait for all compilations in progress."""
        for tuner in self._tuners.values():
            tuner.wait()

    def close(self) -> None:
        """Stop all compilations."""
        for tuner in self._tuners.values():
            tuner.close()
