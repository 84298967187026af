"""AdaHedge: exponential weights for any losses, without a learning rate to choose."""

import math

from torch import Tensor

from online_meta.aggregation import (
    exponential_weights,
    log_sum_exp,
    numbers,
    read_losses,
    start_regrets,
    weighted_mean,
    weights_of,
)
from online_meta.types import Aggregation, Params


def build() -> Aggregation:
    """Return w_i proportional to exp(-eta_t L_i) with eta_t = log N / Delta_{t-1}, for losses of any finite range.

    L_i is the cumulative loss of expert i. The mixability gap of a round is delta_t = w . l + (1 / eta_t) log
    sum_i w_i exp(-eta_t l_i) >= 0, and Delta_t is its sum. As long as Delta is 0, the experts with the least L_i have
    equal weights, and the others none. For every sequence of losses, the regret of sum_t w_t . l_t is at most
    Delta_{T-1} + Delta_T <= 2 Delta_T, which is the live bound; and Delta_T <= sqrt(V_T log N) + (2/3 log N + 1) S, S
    being the largest difference of two losses in a round and V_T <= T S^2 / 4 the sum of the variances of the losses
    under the weights (de Rooij, van Erven, Gruenwald and Koolen, "Follow the leader if you can, hedge if you must",
    JMLR 2014, section 2).

    w . l is at least the loss of a mixture if the loss is convex in what is mixed. Where that loss is known, it takes
    the place of w . l in delta_t, which is 0 where the difference is negative. The proof needs no more of delta_t than
    that it is at least 0 and at least the difference: the mix losses sum to at most min_i L_i + log N / eta_T, because
    eta does not rise, and log N / eta_T = Delta_{T-1}. For squared losses whose predictions and targets lie in a range
    of length R, the difference is never above 0 once eta <= 1 / (2 R^2) (Kivinen and Warmuth, "Averaging expert
    predictions", EuroCOLT 1999). So Delta_T <= (2 log N + 1) R^2 for any number of rounds, without knowledge of R.

    Where one expert is drawn with probabilities w, w . l is the expected loss: the bound then holds for the expected
    regret.

    Returns:
        The aggregation. Its state has ``regrets`` (N,), the aggregate's cumulative loss minus L_i, and ``gap``, the
        scalar Delta.
    """
    return Aggregation(
        init=lambda count: {"regrets": start_regrets(count), "gap": numbers(0.0)},
        weights=_weights,
        update=_update,
        bound=lambda state: 2 * state["gap"].item(),
        regret=lambda state: max(state["regrets"].tolist()),
    )


def _weights(state: Params) -> Tensor:
    regrets, gap = state["regrets"].tolist(), state["gap"].item()
    best = max(regrets)
    if gap == 0:
        return weights_of([0.0 if regret == best else -math.inf for regret in regrets])
    return exponential_weights([(regret - best) / gap for regret in regrets], math.log(len(regrets)))


def _update(state: Params, losses: Tensor, loss: float | None = None) -> Params:
    regrets, gap = state["regrets"].tolist(), state["gap"].item()
    found = read_losses(losses, len(regrets), loss)
    mean = weighted_mean(_weights(state).tolist(), found)
    after = [regret - one for regret, one in zip(regrets, found, strict=True)]
    mix = max(regrets) - max(after)  # where eta is infinite
    if gap > 0:
        mix += (_log_mean(regrets, gap) - _log_mean(after, gap)) * gap
    loss = mean if loss is None else loss
    found_gap = min(max(min(loss, mean) - mix, 0.0), max(found) - min(found))  # exact but for rounding
    moved = [regret + (loss - one) for regret, one in zip(regrets, found, strict=True)]
    return {"regrets": numbers(moved), "gap": numbers(gap + found_gap)}


def _log_mean(regrets: list[float], gap: float) -> float:
    """Return log mean_i exp(eta (R_i - max R)) / log N with eta = log N / ``gap``, in [-1, 0]."""
    count, best = len(regrets), max(regrets)
    if count == 1:
        return 0.0
    rate = math.log(count)
    return log_sum_exp([(regret - best) / gap * rate for regret in regrets]) / rate - 1
