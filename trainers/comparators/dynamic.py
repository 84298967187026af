"""Estimate the loss of each task's own best meta-parameters, the comparator of dynamic regret."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from online_meta.learners import LearnerContext
from online_meta.regret.ledger import Comparator, is_finite_loss
from online_meta.regret.scoring import score_task
from online_meta.tree import norm
from online_meta.types import Meta, MetaGrad, Params, Task
from streams.history.errors import RoundDiscarded
from trainers.comparators import MIN_JUDGED_STEPS, RefreshRequest, RefreshResult, always_continue, limit_work
from trainers.comparators._sampling import estimate_sum, find_coverage, sample_rounds
from trainers.settings import RegretSettings

STEPS = 10
MIN_RELATIVE_FALL = 0.01
"""L-BFGS stops once 10 steps lower the loss by less than this share, and training once a pass does."""
MAX_SLOPE = 0.1
"""A task whose gradient promises a larger share of its loss for a move of length 1 has not settled."""
NEGLIGIBLE_SHARE = 0.001
"""Training also stops once a pass lowers the loss by less than this share of the leader's: more precision would not
change the regret."""
MAX_PASSES = 4
"""Each pass has twice the steps of the one before. If a loss approaches its minimum like a power of the steps, the fall
of such a pass is about what is left; that of passes of one length is a small part of it."""
MIN_PASSES = 2
"""The first pass may begin too fast after L-BFGS, and end no lower, so it is not judged."""
MAX_EVALUATIONS = 1.25
"""The gradients of a step of L-BFGS, at most."""
STANDS_FOR = "each task's own best meta-parameters"


class Progress(NamedTuple):
    """What the refreshes so far have found.

    Attributes:
        total: the sum of the losses.
        variance: of the sum, due to sampling.
        rounds: the number of rounds up to which they went.
        first: the first round that is covered.
        evaluated: the number of tasks that were optimised.
        unsettled: of these, the tasks whose loss was still falling.
        norms: the sum of the norms of the tasks' gradients where they ended.
    """

    total: float = 0.0
    variance: float = 0.0
    rounds: int = 0
    first: int = 0
    evaluated: int = 0
    unsettled: int = 0
    norms: float = 0.0


class TaskMinimum(NamedTuple):
    """The least loss found for a task, whether it had stopped falling, and the norm of the gradient there."""

    loss: float
    settled: bool
    norm: float


def refresh(
    context: LearnerContext,
    regret: RegretSettings,
    request: RefreshRequest,
    saved: Params | None,
    should_continue: Callable[[], bool] = always_continue,
) -> RefreshResult | None:
    """Estimate sum_{t<rounds} min_w f_t(U_t(w)), the comparator of dynamic regret (Zinkevich, ICML 2003).

    At most ``dynamic_rounds`` of the rounds since the last refresh are optimised, spread evenly with a random offset;
    the sum of the earlier rounds is kept. For each, L-BFGS starts at ``warm_start`` and at the run's start and uses the
    run's own meta-gradients of its task, for at most ``dynamic_steps``. From the better of the two, the run's optimizer
    continues in passes of ``dynamic_steps``, then 2, 4 and 8 times as many steps, in each of
    which the learning rate falls to 0. It stops when a pass but the first lowers the loss by less than 1 %, or by less
    than 0.1 % of that of ``warm_start``; the task has then settled, if the pass was long enough.
    Within ``comparator_budget``, as few tasks are optimised as it is sure to suffice for, at least two.

    A task's result is never below its minimum, so the regret is a lower bound if every round was optimised. Rounds that
    are left out give the standard error.
    """
    before = _restore(request, saved)
    new = range(before.rounds, request.rounds)
    coverage = find_coverage(context.buffer, new, request.skipped)
    if not len(coverage.rounds) and any(round not in request.skipped for round in new):
        raise RoundDiscarded(f"retention has taken all rounds from {new.start} to {request.rounds - 1}")
    if coverage.first > new.start:  # What was found for earlier rounds does not join on: a gap lies between.
        before = Progress(first=coverage.first)
    starts = [request.warm_start or context.start, *([context.start] if request.warm_start else [])]
    limit = limit_work(regret.comparator_budget, context.steps_per_round * context.batch, request)
    most = regret.dynamic_steps * (len(starts) * MAX_EVALUATIONS + 2**MAX_PASSES - 1) + 2 * len(starts)
    sample = sample_rounds(coverage, int(min(regret.dynamic_rounds, max(2, limit / most))), context.seed)
    found: list[TaskMinimum] = []
    for round in sample.rounds:
        try:
            found.append(_minimise_task_loss(context, starts, context.buffer[round], regret, should_continue))
        except _Interrupted:
            return None
    estimate = estimate_sum([one.loss for one in found], sample.weights)
    progress = Progress(
        total=before.total + estimate.total,
        variance=before.variance + estimate.variance,
        rounds=request.rounds,
        first=before.first,
        evaluated=before.evaluated + len(found),
        unsettled=before.unsettled + sum(not one.settled for one in found),
        norms=before.norms + sum(one.norm for one in found),
    )
    return RefreshResult(_make_comparator(progress), _to_tensors(progress))


def _make_comparator(progress: Progress) -> Comparator:
    norm = progress.norms / progress.evaluated if progress.evaluated else None
    return Comparator(
        "dynamic",
        progress.rounds,
        progress.total,
        math.sqrt(progress.variance),
        settled=progress.unsettled == 0,
        first_round=progress.first,
        evaluated=progress.evaluated,
        gradient_norm=norm,
    )


def _to_tensors(progress: Progress) -> Params:
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in progress._asdict().items()}


def _restore(request: RefreshRequest, saved: Params | None) -> Progress:
    if saved is None or saved["rounds"] > request.rounds:  # Rounds that were not durable are played again.
        return Progress()
    found = {name: float(value) for name, value in saved.items()}
    sums = Progress(found["total"], found["variance"], int(found["rounds"]))
    if "unsettled" not in found:  # The state of 0.1.0 does not say whether its tasks had settled.
        return sums._replace(unsettled=sums.rounds)
    counts = {name: int(found[name]) for name in ("first", "evaluated", "unsettled")}
    return sums._replace(**counts, norms=found["norms"])


def _minimise_task_loss(
    context: LearnerContext,
    starts: Sequence[Meta],
    task: Task,
    regret: RegretSettings,
    should_continue: Callable[[], bool],
) -> TaskMinimum:
    """Return the least f(U(w)) that is found from ``starts``; raises ``_Interrupted`` when it may not proceed."""
    search = _Search(context, task, should_continue)
    scale = search.score(starts[0])
    for start in starts:
        search.run_lbfgs(start, regret.dynamic_steps)
    settled = False
    negligible = NEGLIGIBLE_SHARE * abs(scale) if is_finite_loss(scale) else 0.0
    for index in range(MAX_PASSES if regret.dynamic_steps and is_finite_loss(search.loss) else 0):
        before = search.loss
        search.run_pass(regret.dynamic_steps * 2**index)
        settled = not search.loss < before - max(MIN_RELATIVE_FALL * abs(before), negligible)
        if settled and index + 1 >= MIN_PASSES:
            break
    if not is_finite_loss(search.loss):
        return TaskMinimum(regret.loss_cap, False, 0.0)
    norm = search.gradient_norm()
    flat = search.loss <= negligible or norm < MAX_SLOPE * abs(search.loss)
    return TaskMinimum(search.loss, settled and flat and regret.dynamic_steps >= MIN_JUDGED_STEPS, norm)


class _Search:
    """A search for the least loss of one task: the best ``loss`` so far, and its meta-parameters."""

    def __init__(self, context: LearnerContext, task: Task, should_continue: Callable[[], bool]) -> None:
        self._context, self._task, self._should_continue = context, task, should_continue
        self.loss, self._best = math.inf, context.start

    def score(self, meta: Meta) -> float:
        """Return the loss of meta-parameters, and keep them if it is the least so far."""
        if not self._should_continue():
            raise _Interrupted
        loss = score_task(self._context.inner, meta, self._task).loss_after
        if loss < self.loss:
            self.loss, self._best = loss, _copy(meta)
        return loss

    def _gradient(self, meta: Meta) -> MetaGrad:
        if not self._should_continue():
            raise _Interrupted
        return self._context.gradient(meta, self._task)

    def run_lbfgs(self, start: Meta, steps: int) -> None:
        """Run L-BFGS (Liu and Nocedal, 1989) until 10 steps lower the loss by less than 1 %."""
        meta = _copy(start)
        free = [value for part in meta for value in part.values()]
        optimizer = torch.optim.LBFGS(free, max_iter=STEPS, history_size=STEPS, line_search_fn="strong_wolfe")

        def evaluate() -> float:
            found = self._gradient(meta)
            for value, grad in zip(free, (grad for part in found.grads for grad in part.values()), strict=True):
                value.grad = grad
            return float(found.loss)

        best = self.score(meta)
        for _ in range(0, steps, STEPS):
            optimizer.step(evaluate)  # type: ignore[no-untyped-call]
            loss = self.score(meta)
            falls, best = loss < best - MIN_RELATIVE_FALL * abs(best), min(best, loss)
            if not falls:
                break

    def run_pass(self, steps: int) -> None:
        """Make steps of the run's optimizer from the best so far, while the learning rate falls to 0 (a cosine)."""
        engine = self._context.engine(self._best)
        for step in range(steps):
            engine.lr_scale = (1 + math.cos(math.pi * step / steps)) / 2
            engine.apply(self._gradient(engine.meta()), 1.0)
        self.score(engine.meta())

    def gradient_norm(self) -> float:
        """Return the norm of the gradient at the best meta-parameters."""
        return float(norm(self._gradient(self._best).grads))


def _copy(meta: Meta) -> Meta:
    return Meta(*({name: value.detach().clone() for name, value in part.items()} for part in meta))


class _Interrupted(Exception):
    """The comparator may not proceed."""
