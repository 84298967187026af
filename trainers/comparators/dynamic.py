"""Estimate the loss of each task's own best meta-parameters, the comparator of dynamic regret."""

import math
from collections.abc import Callable

import torch

from online_meta.learners import LearnerContext
from online_meta.regret.ledger import Comparator, is_finite_loss
from online_meta.regret.scoring import score_task
from online_meta.types import Meta, Params, Task
from streams.history.errors import RoundDiscarded
from trainers.comparators import RefreshRequest, RefreshResult, always_continue
from trainers.comparators._sampling import Estimate, estimate_sum, list_eligible_rounds, sample_rounds
from trainers.settings import RegretSettings

STEPS = 10
MIN_RELATIVE_FALL = 0.01
"""Relative fall of the loss in ``STEPS`` steps below which L-BFGS stops."""

STANDS_FOR = "each task's own best meta-parameters"


def refresh(
    context: LearnerContext,
    regret: RegretSettings,
    request: RefreshRequest,
    saved: Params | None,
    should_continue: Callable[[], bool] = always_continue,
) -> RefreshResult | None:
    """Estimate sum_{t<rounds} min_w f_t(U_t(w)), the comparator of dynamic regret (Zinkevich, ICML 2003).

    At most ``dynamic_rounds`` of the rounds since the last refresh are optimised, spread evenly with a random offset;
    the sum of the earlier rounds is kept. For each, L-BFGS starts at ``warm_start`` and uses the run's own
    meta-gradients of its task, until the loss falls by less than 1 % in 10 steps, for at most ``dynamic_steps``. The
    result is never below the minimum, so the regret is a lower bound. Rounds that are left out give the standard error.
    """
    before, first = _restore(request, saved)
    new = range(first, request.rounds)
    eligible = list_eligible_rounds(context.buffer, new, request.skipped)
    if not len(eligible) and any(round not in request.skipped for round in new):
        raise RoundDiscarded(f"retention has taken all rounds from {first} to {request.rounds - 1}")
    sample = sample_rounds(eligible, new, request.skipped, regret.dynamic_rounds, context.seed)
    losses = []
    for round in sample.rounds:
        loss = _minimise_task_loss(
            context, request.warm_start or context.start, context.buffer[round], regret.dynamic_steps, should_continue
        )
        if loss is None:
            return None
        losses.append(loss if is_finite_loss(loss) else regret.loss_cap)
    found = estimate_sum(losses, sample.weights)
    total, variance = before.total + found.total, before.variance + found.variance
    state = {"total": total, "variance": variance, "rounds": request.rounds}
    comparator = Comparator("dynamic", request.rounds, total, math.sqrt(variance))
    return RefreshResult(comparator, {name: torch.tensor(value, dtype=torch.float64) for name, value in state.items()})


def _restore(request: RefreshRequest, saved: Params | None) -> tuple[Estimate, int]:
    if saved is None or saved["rounds"] > request.rounds:  # Rounds that were not durable are played again.
        return Estimate(0.0, 0.0), 0
    return Estimate(float(saved["total"]), float(saved["variance"])), int(saved["rounds"])


def _minimise_task_loss(
    context: LearnerContext, warm_start: Meta, task: Task, steps: int, should_continue: Callable[[], bool]
) -> float | None:
    """Return the least f(U(w)) that L-BFGS (Liu and Nocedal, 1989) finds; None when it may not proceed."""
    meta = Meta(*({name: value.detach().clone() for name, value in part.items()} for part in warm_start))
    free = [value for part in meta for value in part.values()]
    optimizer = torch.optim.LBFGS(free, max_iter=STEPS, history_size=STEPS, line_search_fn="strong_wolfe")

    def evaluate() -> float:
        if not should_continue():
            raise _Interrupted
        found = context.gradient(meta, task)
        for value, grad in zip(free, (grad for part in found.grads for grad in part.values()), strict=True):
            value.grad = grad
        return float(found.loss)

    best = score_task(context.inner, meta, task).loss_after
    try:
        for _ in range(0, steps, STEPS):
            optimizer.step(evaluate)  # type: ignore[no-untyped-call]
            loss = score_task(context.inner, meta, task).loss_after
            falls, best = loss < best - MIN_RELATIVE_FALL * abs(best), min(best, loss)
            if not falls:
                break
    except _Interrupted:
        return None
    return best


class _Interrupted(Exception):
    """The comparator may not proceed."""
