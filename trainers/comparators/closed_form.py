"""The best fixed meta-parameters by algebra: exact, where f_t(U_t(w)) is a quadratic in w."""

from collections.abc import Callable

from online_meta.closed_form import Quadratic, minimise, no_quadratic, quadratic_of
from online_meta.regret import Comparator
from online_meta.setup import LearnerSetup
from online_meta.types import Params
from trainers.comparing import Answered, Asked, GivenUp, always
from trainers.sampling import counted_rounds
from trainers.settings import RegretSettings


def refresh(
    setup: LearnerSetup,
    regret: RegretSettings,
    asked: Asked,
    saved: Params | None,
    proceed: Callable[[], bool] = always,
) -> Answered | None:
    """Return min_w sum_{t<rounds} f_t(U_t(w)) by the sum of the rounds' quadratics; its standard error is 0.

    Each round is read once, whatever the number of refreshes; what is kept is a matrix.
    Raises ``GivenUp`` where f_t(U_t(w)) is no quadratic, or when retention has taken a round before it was read.
    """
    total, first = _take_up(setup, asked, saved)
    new = range(first, asked.rounds)
    counted = counted_rounds(setup.past, new, asked.skipped)
    if len(counted) < len(new) - sum(round in new for round in asked.skipped):
        raise GivenUp(
            f"retention has taken rounds from {first} on before they were read, so what the best fixed meta-parameters "
            "would have lost is not known exactly any more: lower [regret] every_rounds, or let retention keep more"
        )
    for round in counted:
        if not proceed():
            return None
        try:
            total = total.plus(quadratic_of(setup.inner, setup.start, setup.past[int(round)]))
        except ValueError as error:
            raise GivenUp(f"round {round}: {error}") from error
    comparator = Comparator("closed_form", asked.rounds, minimise(total).value, 0.0)
    state = {"matrix": total.matrix, "slope": total.slope, "offset": total.offset}
    return Answered(comparator, {**state, "rounds": total.offset.new_tensor(asked.rounds)})


def _take_up(setup: LearnerSetup, asked: Asked, saved: Params | None) -> tuple[Quadratic, int]:
    nothing = no_quadratic(sum(value.numel() for value in setup.start.weights.values()))
    if saved is None or saved["rounds"] > asked.rounds:  # Rounds that were not durable are played again.
        return nothing, 0
    return Quadratic(*(saved[name] for name in Quadratic._fields)), int(saved["rounds"])
