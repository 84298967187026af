"""MOML: online meta-learning with constant memory, without revisiting tasks."""

from typing import Annotated

import torch
from annotated_types import Gt
from torch.utils._pytree import tree_map

from online_meta.answers import believe_by_inner_loop, names_of, pack_meta, unpack_meta
from online_meta.learners import LR, OPTIMIZER, LearnerContext, ParameterLearner, use_own_optimizer
from online_meta.learners._online_step import apply_from_first_rank, copy_state, restore_state
from online_meta.meta_optimizer import flatten_meta, unflatten_meta
from online_meta.regret.scoring import ScoredTasks
from online_meta.schedules.constant import constant
from online_meta.tree import zeros
from online_meta.types import (
    Batch,
    Belief,
    Learned,
    Meta,
    MetaGrad,
    Params,
    State,
    StepReport,
    Task,
    TensorFilter,
)

DUAL, ANCHOR = "dual", "anchor"
"""Prefixes of the names of the two state vectors in the saved state."""


class MemoryEfficientLearner(ParameterLearner):
    """MOML (Acar, Zhu & Saligrama, Memory Efficient Online Meta Learning, ICML 2021).

    In addition to the meta-parameters w it holds two vectors of the same size: the dual lambda, initially 0, which
    represents the gradients of past rounds, and the anchor omega, initially w_1, a running mean of the iterates. In
    round t, with f_t and U_t of this round's task alone,

        w_{t+1}      ~ argmin_w  f_t(U_t(w)) - <lambda_t, w> + alpha / 2 |w - omega_t|^2
        lambda_{t+1} = lambda_t - alpha (w_{t+1} - omega_t)
        omega_{t+1}  = (w_{t+1} + omega_t) / 2 - lambda_{t+1} / (2 alpha)

    The minimum is approached from w_t by ``steps`` meta-steps with the run's estimator and an optimizer of its own (the
    paper uses gradient descent). At the minimum, lambda_{t+1} is the gradient of f_t(U_t(w)), which represents this
    round in the next ones. The inner rule's learned parameters are part of w. A step that is not finite ends its round;
    if it is the first one, the task changes nothing.
    """

    def __init__(self, context: LearnerContext, alpha: float = 1.0, steps: int = 10) -> None:
        """Start at round 0; raise ``ValueError`` unless ``alpha`` is above 0 and ``steps`` at least 1."""
        if not alpha > 0 or steps < 1:
            raise ValueError(f"alpha is {alpha} and steps {steps}: alpha must be above 0, and steps at least 1")
        super().__init__()
        self.engine = context.engine(context.start)
        self._context, self._alpha, self._steps = context, alpha, steps
        self.inner = context.inner
        self._names = names_of(context.start)
        self._schedule = constant() if context.schedule is None else context.schedule
        self.lr_scale = 1.0
        self._dual, self._anchor = zeros(context.start), context.start
        self._round = 0

    def state(self) -> State:
        """Return w_t, from which the learner answers."""
        return pack_meta(self.engine.meta())

    def believe(self, state: State, support: Batch) -> dict[str, Belief]:
        """Adapt the meta-parameters in ``state`` to a support set; a pure function."""
        return believe_by_inner_loop(self.inner, unpack_meta(state, self._names), support)

    def learn(self, *tasks: Task) -> Learned:
        """Learn the tasks scored since the last call, one by one."""
        self._scored.take(tasks)
        return Learned((), tuple(report for task in tasks for report in self._learn(task)))

    def learn_more(self, update: int) -> tuple[StepReport, ...]:
        """Do nothing: this learner does not revisit past tasks."""
        return ()

    def _learn(self, task: Task) -> list[StepReport]:
        self.engine.lr_scale = self.lr_scale * self._schedule(self._round)
        reports: list[StepReport] = []
        while len(reports) < self._steps and all(report.skipped is None for report in reports):
            reports.append(apply_from_first_rank(self.engine, self._objective_gradient(task)))
        if reports[0].skipped is None:
            self._update_state()
        self._round += 1
        return reports

    def _objective_gradient(self, task: Task) -> MetaGrad:
        """Return the gradient of this round's objective at w."""
        meta, alpha = self.engine.meta(), self._alpha
        found = self._context.gradient(meta, task)
        with torch.no_grad():
            grads: Meta = tree_map(
                lambda grad, dual, w, anchor: grad - dual + alpha * (w - anchor),
                found.grads,
                self._dual,
                meta,
                self._anchor,
            )
        return MetaGrad(found.loss, grads)

    def _update_state(self) -> None:
        meta, alpha = self.engine.meta(), self._alpha
        self._dual = tree_map(lambda dual, w, anchor: dual - alpha * (w - anchor), self._dual, meta, self._anchor)
        self._anchor = tree_map(
            lambda w, anchor, dual: (w + anchor) / 2 - dual / (2 * alpha), meta, self._anchor, self._dual
        )

    def save(self, keep: TensorFilter | None = None) -> Params:
        """Return the state of the engine and the two vectors; its size does not depend on the number of rounds."""
        return {
            **self.engine.save(keep),
            **copy_state({DUAL: flatten_meta(self._dual), ANCHOR: flatten_meta(self._anchor)}, keep),
        }

    def load(self, saved: Params, rounds: int) -> None:
        """Restore the state that ``save`` returned after ``rounds`` learned rounds."""
        rest, like = dict(saved), flatten_meta(self._context.start)
        self._dual, self._anchor = (unflatten_meta(restore_state(rest, part, like)) for part in (DUAL, ANCHOR))
        self.engine.load(rest)
        self._round, self._scored = rounds, ScoredTasks()


def build(
    context: LearnerContext,
    alpha: float = 1.0,
    steps: int = 10,
    optimizer: str = OPTIMIZER,
    lr: Annotated[float, Gt(0)] = LR,
) -> MemoryEfficientLearner:
    """Create the MOML learner.

    Args:
        context: the stream's common settings.
        alpha: strength of the pull to the anchor, above 0; the larger, the slower the meta-parameters move.
        steps: number of meta-steps per round, at least 1.
        optimizer: the optimizer of its meta-steps, as in [meta].
        lr: its learning rate, above 0, constant over the rounds.

    Raises:
        ValueError: if an option is out of range.
    """
    return MemoryEfficientLearner(use_own_optimizer(context, optimizer, lr), alpha, steps)
