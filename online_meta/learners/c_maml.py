"""Continual-MAML: weights that stay with a task as long as it goes on, over slow weights that learn what is new."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from online_meta.finite import is_finite
from online_meta.functional import judged
from online_meta.inner import fast_weights, finish, see
from online_meta.learners._one_task import copies_of, step_on, take, whole
from online_meta.schedules.constant import constant
from online_meta.score import ScoredTasks, judge_prefixes, score_task
from online_meta.setup import LearnerSetup
from online_meta.types import Keep, Learned, Meta, Params, Score, StepReport, Task

CARRIED = "carried"
"""What the names of the carried weights begin with in what is saved."""


class Limits(NamedTuple):
    """What decides, in units of the loss.

    Attributes:
        gamma: the weights that are carried are left when their loss is by so much above that of new ones; any number.
        level: of the query loss, from which on the slow weights learn at their full rate; above 0.
        power: of the share of the rate below it; 0 or more, 0 for the full rate always.
    """

    gamma: float
    level: float
    power: float


class ContinualMaml:
    """Continual-MAML (Caccia et al., Online Fast Adaptation and Knowledge Accumulation, NeurIPS 2020).

    Beside the slow weights w, the meta-parameters, it carries the fast weights theta, at first w, from task to task.
    With L the loss on the support set of a new task, the task before is taken to go on while

        L(theta) - L(U(w)) < gamma

    and the new one is answered from theta on, else from w on, by the inner loop on its support set; the loss before
    adaptation is that of theta. To learn it,

        w     <- w - g(f(U(w))) * lr * grad f(U(w)),    g(f) = min(1, f / level)^power
        theta <- U(theta) if it goes on, else U(w), here on support and query together

    where f is the query loss, so that what is solved already moves the slow weights little.

    What differs from the paper: there the stream comes in batches, a batch is the query of the one before it, if no
    task ends between the two, and the slow weights learn from such pairs. Here a support set and its query set are one
    such pair, known to be of one task, so the slow weights learn in each round, by the run's estimator and optimizer,
    and that a task ends is inferred between rounds alone. There is no training ahead of the stream.

    A task whose gradient or loss is not finite changes nothing.
    """

    def __init__(self, setup: LearnerSetup, limits: Limits) -> None:
        """Begin at round 0. Raises ``ValueError`` for limits out of their range."""
        if not (limits.gamma == limits.gamma and limits.level > 0 and limits.power >= 0):
            raise ValueError(
                f"gamma is {limits.gamma}, level {limits.level} and power {limits.power}: the first is a number, "
                "the second above 0, the last 0 or more"
            )
        self.engine = setup.engine(setup.start)
        self._setup, self._limits, self._loss = setup, limits, judged(setup.inner.loss)
        self._schedule = constant() if setup.schedule is None else setup.schedule
        self._carried = fast_weights(setup.inner, setup.start.weights)
        self._round = 0
        self._scored = ScoredTasks()

    def score(self, task: Task, prefixes: Sequence[int] = ()) -> Score:
        """Return the losses of the next round's task; its support set alone decides where adaptation begins."""
        self._scored.add(task)
        return judge_prefixes(self._judge, task, prefixes)

    def _judge(self, task: Task) -> Score:
        inner, carried = self._setup.inner, self._with_carried()
        begin = carried if self._goes_on(task) else self.engine.meta()
        score = score_task(inner, begin, task, self._setup.accuracy)
        with torch.no_grad():
            return score._replace(loss_before=float(self._loss(see(inner, carried, {}), task.query)))

    def _with_carried(self) -> Meta:
        """Return the meta-parameters with the carried weights in place of those that adapt."""
        slow = self.engine.meta()
        return Meta({**slow.weights, **self._carried}, slow.rule)

    def _goes_on(self, task: Task) -> bool:
        """Return whether the task before goes on; losses that are not finite say that it does not."""
        inner, support = self._setup.inner, task.support
        with torch.no_grad():
            carried = self._loss(see(inner, self._with_carried(), {}), support)
            new = self._loss(inner.adapt(self.engine.meta(), support), support)
        return float(carried) - float(new) < self._limits.gamma

    def learn(self, *tasks: Task) -> Learned:
        """Learn the tasks scored since the last call, one after the other."""
        self._scored.take(tasks)
        return Learned((), tuple(self._learn(task) for task in tasks))

    def learn_more(self, update: int) -> tuple[StepReport, ...]:
        """Learn nothing: there is no past task to come back to."""
        return ()

    def _learn(self, task: Task) -> StepReport:
        found = self._setup.gradient(self.engine.meta(), task)
        # Ranks on unlike machines may differ in the last bit; they must not differ in what they do.
        goes_on, loss = self._setup.gather([self._goes_on(task), float(found.loss)])[0]
        self.engine.lr_scale = self._schedule(self._round) * self._share(loss)
        report = step_on(self.engine, found)
        if report.skipped is None:
            begin = self._with_carried() if goes_on else self.engine.meta()
            carried = finish(self._setup.inner, begin, whole(task)).phi
            self._carried = carried if is_finite(carried) else self._carried
        self._round += 1
        return report

    def _share(self, loss: float) -> float:
        """Return the share of the learning rate that a task with this query loss is learned by."""
        return float(min(1.0, max(loss, 0.0) / self._limits.level) ** self._limits.power)

    def save(self, keep: Keep | None = None) -> Params:
        """Return the state of the engine and the carried weights."""
        return {**self.engine.save(keep), **copies_of({CARRIED: self._carried}, keep)}

    def load(self, saved: Params, rounds: int) -> None:
        """Take up what ``save`` gave after ``rounds`` learned rounds."""
        rest = dict(saved)
        self._carried = take(rest, CARRIED, self._carried)
        self.engine.load(rest)
        self._round, self._scored = rounds, ScoredTasks()


def build(setup: LearnerSetup, gamma: float = 0.1, level: float = 1.0, power: float = 1.0) -> ContinualMaml:
    """Return the baseline; see ``Limits`` for the options, which are in units of the model's loss."""
    return ContinualMaml(setup, Limits(gamma, level, power))
