"""ARUBA: learn a meta-initialisation and a learning rate for each of its entries from how far tasks move it."""

import math
from dataclasses import replace
from typing import Annotated, NamedTuple

import torch
from annotated_types import Gt
from torch.utils._pytree import tree_map

from online_meta.answers import answer_once, believe_by_inner_loop, names_of, pack_meta, unpack_meta
from online_meta.batches import concat_support_query
from online_meta.batching.task_sum import is_finite
from online_meta.functional.autodiff import outside_inference_mode
from online_meta.inner import apply_update, fast_weights, init_carry, query_loss, see_support
from online_meta.learners import LR, OPTIMIZER, LearnerContext, ParameterLearner, use_own_optimizer
from online_meta.learners._online_step import apply_from_first_rank, copy_state, restore_state
from online_meta.regret.scoring import ScoredTasks
from online_meta.rules.meta_sgd import meta_sgd
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

MOVED, SQUARES = "moved", "squares"
"""Prefixes of the names of the two sums in the saved state."""


class ArubaConstants(NamedTuple):
    """The constants of the paper: the initial rate is ``eps / zeta``; both terms decay with the power ``p``."""

    eps: float
    zeta: float
    p: float


class TrainedTask(NamedTuple):
    """The result of training on a task: the final ``loss``, the ``displacement``, and the sum of squared gradients."""

    loss: torch.Tensor
    displacement: Params
    squares: Params


class AdaptiveRates(ParameterLearner):
    """ARUBA (Khodak, Balcan & Talwalkar, Adaptive Gradient-Based Meta-Learning Methods, NeurIPS 2019).

    Task t, from 1 on, is trained from phi_t by gradient descent with a learning rate for each entry. It ends at
    theta_t after gradients g_1..g_K. With b_1 = eps^2 and g_1 = zeta^2 for each entry,

        eta_t   = sqrt(b_t / g_t)
        b_{t+1} = b_t + eps^2 / (t+1)^p + (phi_t - theta_t)^2 / 2
        g_{t+1} = g_t + zeta^2 / (t+1)^p + sum_k g_k^2

    and an optimizer makes one step of phi along phi_t - theta_t, as in Reptile: gradient descent with rate beta
    gives phi_{t+1} = (1 - beta) phi_t + beta theta_t. Training uses support and query; a new task is adapted to
    with as many steps at eta_t on its support set. The inner loop is the run's, except for its rule, and begins and
    ends with one set of weights. Entries that do
    not adapt have no rate and do not learn. A task whose displacement or squares are not finite changes only the
    count t. Every rank computes the same.
    """

    def __init__(self, context: LearnerContext, constants: ArubaConstants) -> None:
        """Start at round 0; raise ``ValueError`` unless all ``constants`` are above 0."""
        if not all(value > 0 for value in constants):
            raise ValueError(
                f"eps is {constants.eps}, zeta {constants.zeta} and p {constants.p}: all of them must be above 0"
            )
        super().__init__()
        self.engine = context.engine(Meta(context.start.weights, {}))
        self.lr_scale = 1.0
        self._context, self._constants = context, constants
        rule = meta_sgd(lr=constants.eps / constants.zeta)
        own, run = answer_once(context.inner), context.inner
        self.inner = replace(own, rule=rule, answer_steps=run.answer_steps, answer_heads=run.answer_heads)
        self._schedule = constant() if context.schedule is None else context.schedule
        # Sum in float64: in float32, small addends would be lost in a large sum.
        adapting = {
            name: value.abs().double() for name, value in fast_weights(context.inner, context.start.weights).items()
        }
        self._moved: Params = tree_map(lambda value: torch.full_like(value, constants.eps**2), adapting)
        self._squares: Params = tree_map(lambda value: torch.full_like(value, constants.zeta**2), adapting)
        self._names = names_of(self.meta())
        self._round = 0

    def meta(self) -> Meta:
        """Return phi, with the learning rates eta as the rule's parameters."""
        weights = self.engine.meta().weights
        rates = {name: (moved / self._squares[name]).sqrt() for name, moved in self._moved.items()}
        return Meta(weights, {name: rate.to(weights[name].dtype) for name, rate in rates.items()})

    def state(self) -> State:
        """Return phi and eta, from which the learner answers."""
        return pack_meta(self.meta())

    def believe(self, state: State, support: Batch) -> dict[str, Belief]:
        """Adapt phi at the rates eta in ``state`` to a support set; a pure function."""
        return believe_by_inner_loop(self.inner, unpack_meta(state, self._names), support)

    def learn(self, *tasks: Task) -> Learned:
        """Learn the tasks scored since the last call, one by one."""
        self._scored.take(tasks)
        return Learned((), tuple(self._learn(task) for task in tasks))

    def learn_more(self, update: int) -> tuple[StepReport, ...]:
        """Do nothing: this learner does not revisit past tasks."""
        return ()

    def _learn(self, task: Task) -> StepReport:
        found = self._train_on(task)
        moved, squares = self._accumulate(found)
        # If the sums overflow, make the loss NaN so that the step is skipped and reported, too.
        loss = found.loss if is_finite(moved, squares) else found.loss * math.nan
        self.engine.lr_scale = self.lr_scale * self._schedule(self._round)
        weights = self.engine.meta().weights
        report = apply_from_first_rank(self.engine, MetaGrad(loss, Meta({**zeros(weights), **found.displacement}, {})))
        if report.skipped is None:
            self._moved, self._squares = moved, squares
        self._round += 1
        return report

    @outside_inference_mode
    def _train_on(self, task: Task) -> TrainedTask:
        """Train on the task; return the results for the entries that adapt."""
        inner, meta, batch = self.inner, self.meta(), concat_support_query(task)
        with torch.no_grad():
            carry, squares = init_carry(inner, meta, batch), zeros(self._squares)
            for k in range(inner.steps):
                seen = see_support(inner, meta, carry.phi, batch, k)
                squares = {name: total + seen.grads[name].abs().double().square() for name, total in squares.items()}
                carry = apply_update(inner, meta, carry, seen, batch, k)
            displacement = {name: meta.weights[name] - value for name, value in carry.phi.items()}
            return TrainedTask(query_loss(inner, meta, carry.phi, task.query), displacement, squares)

    def _accumulate(self, found: TrainedTask) -> tuple[Params, Params]:
        """Return both sums with the terms of this round's task added."""
        eps, zeta, p = self._constants
        decay = (self._round + 2.0) ** -p
        moved = {
            name: total + eps**2 * decay + found.displacement[name].abs().double().square() / 2
            for name, total in self._moved.items()
        }
        squares = {name: total + zeta**2 * decay + found.squares[name] for name, total in self._squares.items()}
        return moved, squares

    def save(self, keep: TensorFilter | None = None) -> Params:
        """Return the state of the engine and the two sums."""
        return {**self.engine.save(keep), **copy_state({MOVED: self._moved, SQUARES: self._squares}, keep)}

    def load(self, saved: Params, rounds: int) -> None:
        """Restore the state that ``save`` returned after ``rounds`` learned rounds."""
        rest = dict(saved)
        self._moved, self._squares = (restore_state(rest, part, self._moved) for part in (MOVED, SQUARES))
        self.engine.load(rest)
        self._round, self._scored = rounds, ScoredTasks()


def build(
    context: LearnerContext,
    eps: float = 0.01,
    zeta: float = 1.0,
    p: float = 1.0,
    optimizer: str = OPTIMIZER,
    lr: Annotated[float, Gt(0)] = LR,
) -> AdaptiveRates:
    """Create the ARUBA learner.

    Args:
        context: the stream's common settings.
        eps: prior scale of the displacement, above 0; the initial rate is ``eps / zeta``.
        zeta: prior scale of the gradients, above 0; the larger both are, the slower the rates change.
        p: power of the prior terms' decay with the task number, above 0.
        optimizer: the optimizer of the initialisation, as in [meta]; "sgd" is that of the paper.
        lr: its learning rate, above 0, constant over the rounds; the paper's beta for "sgd".

    Raises:
        ValueError: if an option is not positive.
    """
    return AdaptiveRates(use_own_optimizer(context, optimizer, lr), ArubaConstants(eps, zeta, p))
