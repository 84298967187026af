"""Continual-MAML: keep fast weights while a task continues, and meta-learn slow weights as its fallback."""

from typing import Annotated, NamedTuple

import torch
from annotated_types import Gt

from online_meta.answers import believe_by_inner_loop, names_of, pack_meta, predict, unpack_meta
from online_meta.batches import concat_support_query, count_samples
from online_meta.batching.task_sum import is_finite
from online_meta.functional.model import evaluation_loss
from online_meta.inner import fast_weights, run_inner_loop, view_adapted
from online_meta.learners import LR, OPTIMIZER, LearnerContext, ParameterLearner, use_own_optimizer
from online_meta.learners._online_step import apply_from_first_rank, copy_state, restore_state
from online_meta.prediction import loss_of
from online_meta.regret.scoring import ScoredTasks
from online_meta.schedules.constant import constant
from online_meta.types import (
    Batch,
    Belief,
    Learned,
    Meta,
    Params,
    State,
    StepReport,
    Task,
    TensorFilter,
)

CARRIED = "carried"
"""Prefix of the names of the carried weights in the saved state."""


class ContinualMamlOptions(NamedTuple):
    """The options of Continual-MAML; losses are in units of the model's loss.

    Attributes:
        gamma: the carried weights are dropped if their support loss exceeds that of newly adapted ones by ``gamma``
            or more; any number.
        level: query loss from which the slow weights learn at their full rate; above 0.
        power: exponent of the rate's factor below ``level``, at least 0; 0 always uses the full rate.
    """

    gamma: float
    level: float
    power: float


class ContinualMaml(ParameterLearner):
    """Continual-MAML (Caccia et al., Online Fast Adaptation and Knowledge Accumulation, NeurIPS 2020).

    In addition to the slow weights w, the meta-parameters, it carries fast weights theta over the tasks, initially w.
    With L the loss on the support set of a new task, the previous task is assumed to continue if

        L(theta) - L(U(w)) < gamma

    Then the inner loop adapts to the support set from theta, otherwise from w; the loss before adaptation is that of
    theta. Learning updates

        w     <- w - g(f(U(w))) * lr * grad f(U(w)),    g(f) = min(1, f / level)^power
        theta <- U(theta) if the task continues, else U(w), here on support and query together

    where f is the query loss, so tasks that are already solved change the slow weights little.

    Differences from the paper: there the stream arrives in batches, and the slow weights learn from pairs of
    consecutive batches of one task. Here the support and query sets of a round are such a pair, so the slow weights
    learn in each round, by the run's estimator and an optimizer of their own, and task changes are detected between
    rounds only. There is no pre-training.

    A task whose gradient or loss is not finite changes nothing.
    """

    def __init__(self, context: LearnerContext, options: ContinualMamlOptions) -> None:
        """Start at round 0; raise ``ValueError`` if an option is out of range."""
        if not (options.gamma == options.gamma and options.level > 0 and options.power >= 0):
            raise ValueError(
                f"gamma is {options.gamma}, level {options.level} and power {options.power}: gamma must be a number, "
                "level above 0, and power at least 0"
            )
        super().__init__()
        self.engine = context.engine(context.start)
        self._context, self._options, self._loss = context, options, evaluation_loss(context.inner.loss)
        self.inner = context.inner
        self._schedule = constant() if context.schedule is None else context.schedule
        self.lr_scale = 1.0
        self._carried = fast_weights(context.inner, context.start.weights)
        self._names = names_of(context.start)
        self._round = 0

    def state(self) -> State:
        """Return the slow and the carried weights, from which the learner answers."""
        return {**pack_meta(self.engine.meta()), **_pack_carried(self._carried)}

    def believe(self, state: State, support: Batch) -> dict[str, Belief]:
        """Adapt to a support set; a pure function of ``state``.

        The support set alone decides where adaptation starts, for each number of inner steps by U of as many; without
        any sample, the carried weights are believed.
        """
        slow, carried = self._unpack(state)
        if not count_samples(support):
            return believe_by_inner_loop(self.inner, carried, support)
        fresh = believe_by_inner_loop(self.inner, slow, support)
        continuing = [suffix for suffix, belief in fresh.items() if self._task_continues(carried, belief, support)]
        kept = believe_by_inner_loop(self.inner, carried, support) if continuing else {}
        return {suffix: kept[suffix] if suffix in continuing else belief for suffix, belief in fresh.items()}

    def _task_continues(self, carried: Meta, fresh: Belief, support: Batch) -> bool:
        """Return whether the previous task continues; False if a loss is NaN.

        ``fresh`` is what is believed after adapting the slow weights.
        """
        with torch.no_grad():
            old = self._loss(view_adapted(self.inner, carried, {}, support), support)
            new = loss_of(predict(self.inner.loss, fresh, support.x), support.y, support.weight)
        return float(old) - float(new) < self._options.gamma

    def _unpack(self, state: State) -> tuple[Meta, Meta]:
        """Return the slow meta-parameters, and those with the carried weights in place of the fast ones."""
        slow = unpack_meta(state, self._names)
        fast = {name: state[f"{CARRIED}.{name}"] for name in self._carried}
        return slow, Meta({**slow.weights, **fast}, slow.rule)

    def learn(self, *tasks: Task) -> Learned:
        """Learn the tasks scored since the last call, one by one."""
        self._scored.take(tasks)
        return Learned((), tuple(self._learn(task) for task in tasks))

    def learn_more(self, update: int) -> tuple[StepReport, ...]:
        """Do nothing: this learner does not revisit past tasks."""
        return ()

    def _learn(self, task: Task) -> StepReport:
        found = self._context.gradient(self.engine.meta(), task)
        # Use the first rank's values: rounding may differ between machines, but all ranks must decide alike.
        slow, carried = self._unpack(self.state())
        (fresh,) = self.inner.believe(slow, task.support)
        own = [self._task_continues(carried, fresh, task.support), float(found.loss)]
        continues, loss = self._context.gather(own)[0]
        self.engine.lr_scale = self.lr_scale * self._schedule(self._round) * self._lr_share(loss)
        report = apply_from_first_rank(self.engine, found)
        if report.skipped is None:
            slow, carried = self._unpack(self.state())
            start = carried if continues else slow
            phi = run_inner_loop(self.inner, start, concat_support_query(task)).phi
            fast = {name: phi[name] for name in self._carried}
            self._carried = fast if is_finite(fast) else self._carried
        self._round += 1
        return report

    def _lr_share(self, loss: float) -> float:
        """Return the factor of the learning rate for a task with this query loss."""
        return float(min(1.0, max(loss, 0.0) / self._options.level) ** self._options.power)

    def save(self, keep: TensorFilter | None = None) -> Params:
        """Return the state of the engine and the carried weights."""
        return {**self.engine.save(keep), **copy_state({CARRIED: self._carried}, keep)}

    def load(self, saved: Params, rounds: int) -> None:
        """Restore the state that ``save`` returned after ``rounds`` learned rounds."""
        rest = dict(saved)
        self._carried = restore_state(rest, CARRIED, self._carried)
        self.engine.load(rest)
        self._round, self._scored = rounds, ScoredTasks()


def _pack_carried(carried: Params) -> State:
    return {f"{CARRIED}.{name}": value for name, value in carried.items()}


def build(
    context: LearnerContext,
    gamma: float = 0.1,
    level: float = 1.0,
    power: float = 1.0,
    optimizer: str = OPTIMIZER,
    lr: Annotated[float, Gt(0)] = LR,
) -> ContinualMaml:
    """Create the Continual-MAML learner; ``ContinualMamlOptions`` describes the first options and their ranges.

    ``optimizer`` is the optimizer of the slow weights, as in [meta]; ``lr`` is its learning rate, above 0.
    """
    options = ContinualMamlOptions(gamma, level, power)
    return ContinualMaml(use_own_optimizer(context, optimizer, lr), options)
