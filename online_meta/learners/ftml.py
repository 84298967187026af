"""Follow the Meta-Leader."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path as Folder
from typing import Any

from online_meta.draws import Replay
from online_meta.finite import sum_finite, sum_measured
from online_meta.inner import Inner
from online_meta.past import MemoryPast
from online_meta.replay.uniform import uniform
from online_meta.revisits import Revisits
from online_meta.schedules.constant import constant
from online_meta.score import ScoredTasks, score_task
from online_meta.setup import LearnerSetup, keep_alone
from online_meta.shared_sums import hand_out, own_picks, sum_picks
from online_meta.summing import TaskSum
from online_meta.types import (
    AccuracyFn,
    Engine,
    Keep,
    Learned,
    MetaGradient,
    Params,
    Past,
    Schedule,
    Score,
    StepReport,
    Task,
)


class FollowTheMetaLeader:
    """w_{t+1} ~ argmin_w sum_{k<=t} f_k(U_k(w)) by a few meta-steps on past rounds (Finn et al., ICML 2019).

    Each round's task is scored with w_t, then remembered; ``steps_per_round`` meta-steps follow, each on
    at most ``batch`` rounds that ``replay`` picks among all rounds so far, this one included. Everything
    is a function of the tasks, the arguments and ``seed``. With an engine of several ranks each rank
    takes every ``world``-th pick. A revisited task whose gradient is not finite is left out of its step.
    """

    def __init__(
        self,
        inner: Inner,
        gradient: MetaGradient,
        engine: Engine,
        *,
        replay: Replay | None = None,
        batch: int = 25,
        steps_per_round: int = 1,
        seed: int = 0,
        past: Past | None = None,
        accuracy: AccuracyFn | None = None,
        programs: Folder | None = None,
        schedule: Schedule | None = None,
        gather: Callable[[Any], list[Any]] = keep_alone,
    ) -> None:
        """Begin at round 0 with the engine's meta-parameters; ``past`` keeps tasks in memory, ``replay`` is uniform.

        ``total`` sums the meta-gradients of a batch, task by task until it is told to ``follow`` another path, such as
        a ``PathFinder`` finds; compiled programs lie in the folder ``programs``. The ``schedule`` multiplies the
        engine's learning rate, and so does ``lr_scale``, for a run that has diverged. ``gather`` is the set-up's.

        Raises ``ValueError`` when ``batch`` or ``steps_per_round`` is below 1.
        """
        if batch < 1 or steps_per_round < 1:
            raise ValueError(f"batch is {batch} and steps_per_round {steps_per_round}; both must be 1 or more")
        self.inner = inner
        self.engine = engine
        self.round = 0
        self.lr_scale = 1.0
        self.total = TaskSum(gradient, programs)
        self._steps = steps_per_round
        self._revisits = Revisits(uniform() if replay is None else replay, seed, batch, gather)
        measure = self._revisits.measure
        self._gradient = (
            sum_finite(self.total) if measure is None else sum_measured(gradient, measure, self._revisits.told)
        )
        self._past: Past = MemoryPast() if past is None else past
        self._accuracy = accuracy
        self._schedule: Schedule = constant() if schedule is None else schedule
        self._scored = ScoredTasks()

    def score(self, task: Task, prefixes: Sequence[int] = ()) -> Score:
        """Return the losses of the next round's task under the current leader; changes no parameter."""
        score = score_task(self.inner, self.engine.meta(), task, self._accuracy, prefixes)
        self._scored.add(task)
        return score

    def learn(self, *tasks: Task) -> Learned:
        """Remember the tasks scored since the last call, then make this update's meta-steps.

        Returns the rounds revisited and each step's report. Raises ``OrderError`` for a task that was not scored.
        """
        self._scored.take(tasks)
        self.engine.lr_scale = self.lr_scale * self._schedule(self.round)
        for task in tasks:
            self._past.remember(self.round, task)
            self.round += 1
        self._revisits.begin(self.round - 1, self._past.kept(self.round))
        self._past.expect(self, self._foreseen())
        replayed: list[int] = []
        reports: list[StepReport] = []
        for step in range(self._steps):
            rounds, report = self._step(step)
            replayed += rounds
            reports.append(report)
        return Learned(tuple(replayed), tuple(reports))

    def learn_more(self, update: int) -> tuple[StepReport, ...]:
        """Make ``steps_per_round`` more meta-steps on past rounds, the ``update``-th time since the last round, from 0.

        Of no round at all nothing is learned. Raises ``OrderError`` when tasks were scored that are not learned.
        """
        self._scored.check_none()
        if not self.round:
            return ()
        self.engine.lr_scale = self.lr_scale * self._schedule(self.round - 1)
        self._revisits.again(self.round - 1, self._past.kept(self.round))
        first = (update + 1) * self._steps
        return tuple(self._step(step)[1] for step in range(first, first + self._steps))

    def _foreseen(self) -> Iterator[int]:
        """Tell what this rank will probably revisit, of the rounds that are there."""
        for picks in self._revisits.foresee(self._steps):
            yield from (pick.round for pick in own_picks(self.engine, picks) if pick.round < self.round)

    def _step(self, step: int) -> tuple[list[int], StepReport]:
        picks = self._revisits.picks(step)
        hand_out(self.engine, self._past, picks)
        total = sum_picks(self.engine, self._gradient, self._past, picks)
        self._revisits.end(own_picks(self.engine, picks))
        return [pick.round for pick in picks], self.engine.apply(*total)

    def save(self, keep: Keep | None = None) -> Params:
        """Return the state of the engine and of the replay: all that cannot be computed again from the history."""
        return {**self.engine.save(keep), **self._revisits.save(keep)}

    def load(self, saved: Params, rounds: int) -> None:
        """Take up what ``save`` gave after ``rounds`` learned rounds."""
        self.engine.load(self._revisits.load(saved))
        self.round = rounds
        self._scored = ScoredTasks()


def build(setup: LearnerSetup) -> FollowTheMetaLeader:
    """Return the learner that the run is about."""
    return FollowTheMetaLeader(
        setup.inner,
        setup.gradient,
        setup.engine(setup.start),
        replay=setup.replay,
        batch=setup.batch,
        steps_per_round=setup.steps_per_round,
        seed=setup.seed,
        past=setup.past,
        accuracy=setup.accuracy,
        programs=setup.programs,
        schedule=setup.schedule,
        gather=setup.gather,
    )
