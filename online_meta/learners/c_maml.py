"""Continual-MAML: weights that stay with a task as long as it goes on, over slow weights that learn what is new."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from online_meta.batching.task_sum import is_finite
from online_meta.functional.model import evaluation_loss
from online_meta.inner import effective_params, fast_weights, run_inner_loop
from online_meta.learners import LearnerContext
from online_meta.learners._online_step import apply_from_first_rank, concat_support_query, copy_state, restore_state
from online_meta.regret.scoring import ScoredTasks, score_learning_curve, score_task
from online_meta.schedules.constant import constant
from online_meta.types import Learned, Meta, Params, Score, StepReport, Task, TensorFilter

CARRIED = "carried"
"""What the names of the carried weights begin with in what is saved."""


class ContinualMamlOptions(NamedTuple):
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

    def __init__(self, context: LearnerContext, options: ContinualMamlOptions) -> None:
        """Begin at round 0. Raises ``ValueError`` for limits out of their range."""
        if not (options.gamma == options.gamma and options.level > 0 and options.power >= 0):
            raise ValueError(
                f"gamma is {options.gamma}, level {options.level} and power {options.power}: the first is a number, "
                "the second above 0, the last 0 or more"
            )
        self.engine = context.engine(context.start)
        self._context, self._options, self._loss = context, options, evaluation_loss(context.inner.loss)
        self._schedule = constant() if context.schedule is None else context.schedule
        self._carried = fast_weights(context.inner, context.start.weights)
        self._round = 0
        self._scored = ScoredTasks()

    def score(self, task: Task, prefixes: Sequence[int] = ()) -> Score:
        """Return the losses of the next round's task; its support set alone decides where adaptation begins."""
        self._scored.add(task)
        return score_learning_curve(self._judge, task, prefixes)

    def _judge(self, task: Task) -> Score:
        inner, carried = self._context.inner, self._with_carried()
        initial = carried if self._task_continues(task) else self.engine.meta()
        score = score_task(inner, initial, task, self._context.accuracy)
        with torch.no_grad():
            return score._replace(loss_before=float(self._loss(effective_params(inner, carried, {}), task.query)))

    def _with_carried(self) -> Meta:
        """Return the meta-parameters with the carried weights in place of those that adapt."""
        slow = self.engine.meta()
        return Meta({**slow.weights, **self._carried}, slow.rule)

    def _task_continues(self, task: Task) -> bool:
        """Return whether the task before goes on; losses that are not finite say that it does not."""
        inner, support = self._context.inner, task.support
        with torch.no_grad():
            carried = self._loss(effective_params(inner, self._with_carried(), {}), support)
            new = self._loss(inner.adapt(self.engine.meta(), support), support)
        return float(carried) - float(new) < self._options.gamma

    def learn(self, *tasks: Task) -> Learned:
        """Learn the tasks scored since the last call, one after the other."""
        self._scored.take(tasks)
        return Learned((), tuple(self._learn(task) for task in tasks))

    def learn_more(self, update: int) -> tuple[StepReport, ...]:
        """Learn nothing: there is no past task to come back to."""
        return ()

    def _learn(self, task: Task) -> StepReport:
        found = self._context.gradient(self.engine.meta(), task)
        # Ranks on unlike machines may differ in the last bit; they must not differ in what they do.
        continues, loss = self._context.gather([self._task_continues(task), float(found.loss)])[0]
        self.engine.lr_scale = self._schedule(self._round) * self._lr_share(loss)
        report = apply_from_first_rank(self.engine, found)
        if report.skipped is None:
            initial = self._with_carried() if continues else self.engine.meta()
            carried = run_inner_loop(self._context.inner, initial, concat_support_query(task)).phi
            self._carried = carried if is_finite(carried) else self._carried
        self._round += 1
        return report

    def _lr_share(self, loss: float) -> float:
        """Return the share of the learning rate that a task with this query loss is learned by."""
        return float(min(1.0, max(loss, 0.0) / self._options.level) ** self._options.power)

    def save(self, keep: TensorFilter | None = None) -> Params:
        """Return the state of the engine and the carried weights."""
        return {**self.engine.save(keep), **copy_state({CARRIED: self._carried}, keep)}

    def load(self, saved: Params, rounds: int) -> None:
        """Take up what ``save`` gave after ``rounds`` learned rounds."""
        rest = dict(saved)
        self._carried = restore_state(rest, CARRIED, self._carried)
        self.engine.load(rest)
        self._round, self._scored = rounds, ScoredTasks()


def build(context: LearnerContext, gamma: float = 0.1, level: float = 1.0, power: float = 1.0) -> ContinualMaml:
    """Return the baseline; see ``ContinualMamlOptions`` for the options, which are in units of the model's loss."""
    return ContinualMaml(context, ContinualMamlOptions(gamma, level, power))
