"""Follow-the-Meta-Leader (FTML)."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from online_meta.answers import believe_by_inner_loop, names_of, pack_meta, unpack_meta
from online_meta.batching.all_reduce import GradientSum, distribute_samples, local_samples, sum_gradients
from online_meta.batching.failures import TaskFailures
from online_meta.batching.programs import Programs
from online_meta.batching.task_sum import TaskSum, sum_skipping_nonfinite, sum_with_measurements
from online_meta.functional.model import checked_loss
from online_meta.inner import Inner
from online_meta.learners import LearnerContext, MemoryReplayBuffer, ParameterLearner, gather_single_process
from online_meta.regret.scoring import ScoredTasks
from online_meta.replay import ReplayPolicy
from online_meta.replay._sampler import ReplaySampler
from online_meta.replay._task_draw import ALL_SAMPLES, DrawnTasks, TaskDraw
from online_meta.replay.uniform import uniform
from online_meta.schedules.constant import constant
from online_meta.types import (
    Batch,
    Belief,
    Engine,
    Learned,
    MetaGradient,
    Params,
    ReplayBuffer,
    Schedule,
    State,
    StepReport,
    Task,
    TensorFilter,
)


class FollowTheMetaLeader(ParameterLearner):
    """The FTML learner: w_{t+1} ~ argmin_w sum_{k<=t} f_k(U_k(w)) by meta-steps on past rounds (Finn et al., 2019).

    Each round's task is scored with w_t and then stored; ``steps_per_round`` meta-steps follow, each on at most
    ``batch`` rounds that ``replay`` draws from all rounds so far, including this one. The tasks, the arguments and
    ``seed`` determine everything. With an engine of several ranks, each rank computes every ``world``-th sample. A
    revisited task whose gradient is not finite is left out of its step.
    """

    def __init__(
        self,
        inner: Inner,
        gradient: MetaGradient,
        engine: Engine,
        *,
        replay: ReplayPolicy | None = None,
        batch: int = 25,
        steps_per_round: int = 1,
        seed: int = 0,
        buffer: ReplayBuffer | None = None,
        programs: Path | Programs | None = None,
        schedule: Schedule | None = None,
        gather: Callable[[Any], list[Any]] = gather_single_process,
        failures: TaskFailures | None = None,
        draw: TaskDraw = ALL_SAMPLES,
    ) -> None:
        """Start at round 0 with the engine's meta-parameters.

        Args:
            inner: the inner loop that adapts to a task.
            gradient: the meta-gradient estimator.
            engine: holds and steps the meta-parameters.
            replay: draws the rounds to revisit; None for ``uniform()``.
            batch: maximum number of rounds per meta-step, at least 1.
            steps_per_round: number of meta-steps per call of ``learn``, at least 1.
            seed: seed of the draws, at least 0.
            buffer: stores the tasks; None to store them in memory.
            programs: folder of compiled programs, used if ``task_sum`` follows a compiled plan.
            schedule: factor of the engine's learning rate by round; None for 1. ``lr_scale`` is a further factor.
            gather: returns on every rank the list of all ranks' values.
            failures: collects the model's exceptions on revisited tasks; None to let them propagate.
            draw: the samples that are drawn of a task each time that it is revisited; by default all. Scores use all.

        Raises:
            ValueError: if ``batch`` or ``steps_per_round`` is below 1.
        """
        if batch < 1 or steps_per_round < 1:
            raise ValueError(f"batch is {batch} and steps_per_round is {steps_per_round}; both must be 1 or more")
        super().__init__()
        self.inner = replace(inner, loss=checked_loss(inner.loss))
        self.engine = engine
        self._names = names_of(engine.meta())
        self.round = 0
        self.lr_scale = 1.0
        self.task_sum = TaskSum(gradient, programs, draw, getattr(inner.loss, "masks", None))
        self._steps, self._seed, self._draw = steps_per_round, seed, draw
        self._sampler = ReplaySampler(uniform() if replay is None else replay, seed, batch, gather)
        self._first_sum, self._gradient_sum = self._choose_sums(gradient, failures)
        self._buffer: ReplayBuffer = MemoryReplayBuffer() if buffer is None else buffer
        self._schedule: Schedule = constant() if schedule is None else schedule

    def _choose_sums(self, gradient: MetaGradient, failures: TaskFailures | None) -> tuple[GradientSum, GradientSum]:
        """Return how gradients are summed at first, and how if the step with that sum was not finite."""
        measure = self._sampler.measure
        if measure is not None:
            measured = GradientSum(sum_with_measurements(gradient, measure, self._sampler.observe), failures)
            return measured, measured
        checked = GradientSum(sum_skipping_nonfinite(self.task_sum), failures)
        if self.engine.world > 1:  # A rank checks its own sum, before those of the others are added.
            return checked, checked
        return GradientSum(sum_skipping_nonfinite(self.task_sum, check=False), failures), checked

    def state(self) -> State:
        """Return the current leader's meta-parameters, from which it answers."""
        return pack_meta(self.engine.meta())

    def believe(self, state: State, support: Batch) -> dict[str, Belief]:
        """Adapt the meta-parameters in ``state`` to a support set; a pure function."""
        return believe_by_inner_loop(self.inner, unpack_meta(state, self._names), support)

    def learn(self, *tasks: Task) -> Learned:
        """Store the tasks scored since the last call, then make ``steps_per_round`` meta-steps.

        Returns the revisited rounds and each step's report. Raises ``OrderError`` for a task that was not scored.
        """
        self._scored.take(tasks)
        self.engine.lr_scale = self.lr_scale * self._schedule(self.round)
        for task in tasks:
            self._remember(task)
        self._sampler.begin_round(self.round - 1, self._buffer.available(self.round))
        self._buffer.prefetch(self, self._predicted_rounds())
        replayed: list[int] = []
        reports: list[StepReport] = []
        for step in range(self._steps):
            rounds, report = self._step(step)
            replayed += rounds
            reports.append(report)
        return Learned(tuple(replayed), tuple(reports))

    def learn_more(self, update: int) -> tuple[StepReport, ...]:
        """Make ``steps_per_round`` more meta-steps on past rounds, for ``update`` number 0, 1, ... of the round.

        Without a past round it does nothing. Raises ``OrderError`` if scored tasks have not been learned.
        """
        self._scored.check_none()
        available = self._buffer.available(self.round)
        if not len(available):
            return ()
        self.engine.lr_scale = self.lr_scale * self._schedule(self.round - 1)
        self._sampler.resume_round(self.round - 1, available)
        first = (update + 1) * self._steps
        return tuple(self._step(step)[1] for step in range(first, first + self._steps))

    def _remember(self, task: Task) -> None:
        self._buffer.add(self.round, task)
        self.round += 1

    def _predicted_rounds(self) -> Iterator[int]:
        """Yield the existing rounds that this rank will probably revisit next."""
        for samples in self._sampler.predict_samples(self._steps):
            yield from (sample.round for sample in local_samples(self.engine, samples) if sample.round < self.round)

    def _step(self, step: int) -> tuple[list[int], StepReport]:
        samples = self._sampler.draw_samples(step)
        distribute_samples(self.engine, self._buffer, samples)
        tasks = DrawnTasks(self._draw, self._buffer, self._seed, self.round - 1, step)
        report = self.engine.apply(*sum_gradients(self.engine, self._first_sum, tasks, samples))
        if report.skipped is not None and self._first_sum is not self._gradient_sum:
            report = self.engine.apply(*sum_gradients(self.engine, self._gradient_sum, tasks, samples))
        self._sampler.finish_step(local_samples(self.engine, samples))
        return [sample.round for sample in samples], report

    def save(self, keep: TensorFilter | None = None) -> Params:
        """Return the state of the engine and of the replay policy; everything else follows from the history."""
        return {**self.engine.save(keep), **self._sampler.save(keep)}

    def load(self, saved: Params, rounds: int) -> None:
        """Restore the state that ``save`` returned after ``rounds`` learned rounds."""
        self.engine.load(self._sampler.load(saved))
        self.round = rounds
        self._scored = ScoredTasks()


def build(context: LearnerContext) -> FollowTheMetaLeader:
    """Create the FTML learner."""
    return FollowTheMetaLeader(
        context.inner,
        context.gradient,
        context.engine(context.start),
        replay=context.replay,
        batch=context.batch,
        steps_per_round=context.steps_per_round,
        seed=context.seed,
        buffer=context.buffer,
        programs=context.programs,
        schedule=context.schedule,
        gather=context.gather,
        failures=context.failures,
        draw=context.draw,
    )
