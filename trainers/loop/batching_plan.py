"""Select the execution plans with which each learner sums meta-gradients."""

import contextlib
import logging
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any

from online_meta.batching.autotune import MEASURE_AFTER_SECONDS, Autotuner
from online_meta.batching.compile import CompileStopped
from online_meta.batching.plan import ExecutionPlan, signature_of
from online_meta.types import Learner, Task
from trainers.build import share_programs
from trainers.distributed.ranks import RankGroup
from trainers.journal.plans import ExecutionPlans
from trainers.learner_settings import list_learners, override_settings
from trainers.settings import EngineSettings, TrainerSettings

log = logging.getLogger(__name__)


class PlanSelector:
    """A selector that sets the execution plans of every learner with a ``task_sum``, and searches for faster ones.

    Args:
        learners: by name.
        settings: [engine] section of the configuration.
        batch: largest number of tasks that one rank sums in a meta-step, or that number for each learner.
        programs: folder of compiled programs of the run; ``settings.programs`` is the cache.
        measure_after: seconds of computation before faster plans are measured.
        steps: number of meta-steps after each round, for each learner; 1 by default.
    """

    def __init__(
        self,
        learners: Mapping[str, Learner],
        settings: EngineSettings,
        batch: int | Mapping[str, int],
        programs: Path,
        measure_after: float = MEASURE_AFTER_SECONDS,
        steps: Mapping[str, int] | None = None,
    ) -> None:
        """Create one tuner for each learner that has a ``task_sum``."""
        self._batch, self._steps = batch, steps
        self._learners: dict[str, Any] = {n: learner for n, learner in learners.items() if hasattr(learner, "task_sum")}
        make = partial(
            Autotuner,
            batching=settings.batching,
            memory_limit=settings.memory_limit,
            folder=share_programs(programs, settings),
            pad_sizes=settings.pad_sizes,
        )
        self._stop = Event()
        self._prepared: set[tuple[str, ExecutionPlan]] = set()
        self._tuners = {
            n: make(learner.task_sum, self._batch_of(n), measure_after=measure_after)
            for n, learner in self._learners.items()
        }

    def _batch_of(self, name: str) -> int:
        return self._batch if isinstance(self._batch, int) else self._batch[name]

    def _count_summed(self, name: str, rounds: int) -> int:
        """Return the number of tasks that a learner has summed, over all its starts, after a number of rounds."""
        batch = self._batch_of(name)
        few = min(rounds, batch)
        return (self._steps or {}).get(name, 1) * (few * (few + 1) // 2 + (rounds - few) * batch)

    def find(self, known: ExecutionPlans, tasks: list[Task], rounds: int | None = None) -> ExecutionPlans:
        """Return the plans in ``known``, with new and faster plans that are available by now.

        Args:
            known: present plans.
            tasks: tasks for whose shapes plans are searched.
            rounds: number of learned rounds, which says how many tasks were summed; None to count those of this
                process.
        """
        found: ExecutionPlans = {}
        for name, tuner in self._tuners.items():
            by_signature = {path.signature: path for path in known.get(name, ())}
            compiled = {path.signature for path in by_signature.values() if path.batching == "compiled"}
            task_sum = self._learners[name].task_sum
            new = [task for task in map(task_sum.example, tasks) if signature_of(task_sum.fit(task)) not in compiled]
            with contextlib.suppress(CompileStopped):  # The run is to end: the known plans will do.
                summed = None if rounds is None else self._count_summed(name, rounds)
                found_now = self._search(name, tuner, new, known.get(name, ()), summed)
                by_signature |= {path.signature: path for path in found_now}
            if by_signature:
                found[name] = tuple(by_signature.values())
        return found

    def _search(
        self, name: str, tuner: Autotuner, tasks: list[Task], known: tuple[ExecutionPlan, ...], summed: int | None
    ) -> tuple[ExecutionPlan, ...]:
        return () if self._stop.is_set() else tuner.find(self._learners[name].engine.meta(), tasks, known, summed)

    def follow(self, paths: ExecutionPlans) -> None:
        """Set the execution plans of the learners."""
        for name, learner in self._learners.items():
            learner.task_sum.follow(paths.get(name, ()))

    def stop_with(self, stop: Event, on_waiting: Callable[[], None]) -> None:
        """Search for no more plans and abandon compilations once ``stop`` is set.

        Args:
            stop: set when the run is to end.
            on_waiting: called several times a second while a compilation is waited for.
        """
        self._stop = stop

        def should_continue() -> bool:
            on_waiting()
            return not stop.is_set()

        for learner in self._learners.values():
            learner.task_sum.should_continue = should_continue

    def prepare(self, tasks: list[Task], rank_group: RankGroup) -> bool:
        """Load or compile the programs that the plans name for the shapes of ``tasks``; a collective.

        It comes before an update, so that a run which must end while it compiles leaves the state of all learners as it
        is after the last round.

        Returns:
            Whether every rank has its programs; False if one of them was stopped.
        """
        plans = {
            (name, plan)
            for name, learner in self._learners.items()
            for signature in {signature_of(learner.task_sum.fit(learner.task_sum.example(task))) for task in tasks}
            if (plan := learner.task_sum.plans.get(signature)) and plan.batching == "compiled"
        } - self._prepared
        if not plans:  # on every rank
            return True
        stopped = False
        try:
            for learner in self._learners.values():
                learner.task_sum.prepare(learner.engine.meta(), [*map(learner.task_sum.example, tasks)])
        except CompileStopped as error:
            log.info("%s; the round is played after the next start", error)
            stopped = True
        if any(rank_group.gather(stopped)):
            return False
        self._prepared |= plans
        return True

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


def select_plans(
    settings: TrainerSettings,
    learners: Mapping[str, Learner],
    programs: Path,
    world: int,
    measure_after: float = MEASURE_AFTER_SECONDS,
) -> PlanSelector:
    """Return the selector of plans for the number of tasks that each of ``world`` ranks sums in a meta-step.

    Deterministic ranks have programs for one task: what is computed next to a task may change its bits.
    """
    own = {one.name: override_settings(settings, one).meta for one in list_learners(settings)}
    batches = {name: 1 if settings.engine.deterministic else -(-meta.batch // world) for name, meta in own.items()}
    steps = {name: meta.steps_per_round for name, meta in own.items()}
    return PlanSelector(learners, settings.engine, batches, programs, measure_after, steps)
