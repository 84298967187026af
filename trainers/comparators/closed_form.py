"""The best fixed meta-parameters by algebra: exact, where f_t(U_t(w)) is a quadratic in w."""

from collections.abc import Callable

import torch

from online_meta.batches import as_named
from online_meta.learners import LearnerContext
from online_meta.regret.closed_form import Quadratic, minimise, quadratic_of, zero_quadratic
from online_meta.regret.ledger import Comparator, is_finite_loss
from online_meta.regret.scoring import score_task
from online_meta.types import Meta, Params, Task
from trainers.comparators import ComparatorUnavailable, RefreshRequest, RefreshResult, always_continue
from trainers.comparators._sampling import list_unread_rounds
from trainers.settings import RegretSettings

EXACT = True


def check(context: LearnerContext, task: Task) -> None:
    """Raise ``ValueError`` if the loss after adaptation to ``task`` is no quadratic in the meta-parameters."""
    quadratic_of(context.inner, context.start, task)


def refresh(
    context: LearnerContext,
    regret: RegretSettings,
    request: RefreshRequest,
    saved: Params | None,
    should_continue: Callable[[], bool] = always_continue,
) -> RefreshResult | None:
    """Return min_w sum_{t<rounds} f_t(U_t(w)) from the sum of the rounds' quadratics; its standard error is 0.

    Each round is read once, whatever the number of refreshes: the state is the sum's matrix and vector. A round whose
    loss is not finite even at the run's start is charged at ``loss_cap``, as it is for the learners.

    Raises:
        ComparatorUnavailable: if an f_t(U_t(w)) is not quadratic, or a round was discarded before it was read.
    """
    total, first = _restore(context, request, saved)
    for round in list_unread_rounds(context.buffer, range(first, request.rounds), request.skipped):
        if not should_continue():
            return None
        total = total.plus(_find_quadratic(context, round, regret.loss_cap))
    comparator = Comparator("closed_form", request.rounds, minimise(total).value, 0.0)
    state = {"matrix": total.matrix, "slope": total.slope, "offset": total.offset}
    return RefreshResult(comparator, {**state, "rounds": total.offset.new_tensor(request.rounds)})


def _find_quadratic(context: LearnerContext, round: int, loss_cap: float) -> Quadratic:
    """Return the quadratic of a round; a constant if the task gives no finite loss, as learners are charged then."""
    task = context.buffer[round]
    numbers = [x.dtype for x in as_named(task.query.x).values() if x.is_floating_point()]
    dtype = numbers[0] if numbers else torch.get_default_dtype()
    start = Meta({name: weight.to(dtype) for name, weight in context.start.weights.items()}, context.start.rule)
    if not is_finite_loss(score_task(context.inner, start, task).loss_after):
        return zero_quadratic(sum(value.numel() for value in context.start.weights.values())).plus_constant(loss_cap)
    try:
        return quadratic_of(context.inner, context.start, task)
    except ValueError as error:
        raise ComparatorUnavailable(f"round {round}: {error}") from error


def _restore(context: LearnerContext, request: RefreshRequest, saved: Params | None) -> tuple[Quadratic, int]:
    nothing = zero_quadratic(sum(value.numel() for value in context.start.weights.values()))
    if saved is None or saved["rounds"] > request.rounds:  # Rounds that were not durable are played again.
        return nothing, 0
    return Quadratic(*(saved[name] for name in Quadratic._fields)), int(saved["rounds"])
