"""Squint: quantile and second-order bounds for losses in a known range."""

import math

from torch import Tensor

from online_meta.aggregation import (
    log_sum_exp,
    numbers,
    read_losses,
    read_range,
    start_regrets,
    weighted_mean,
    weights_of,
)
from online_meta.types import Aggregation, Params

RATES = tuple(2.0**-power for power in range(1, 21))
"""The learning rates eta: 1/2 to 2^-20, of regrets in units of the range."""


def build(*, low: float = 0.0, high: float = 1.0) -> Aggregation:
    """Return w_i proportional to sum_eta eta exp(eta R_i - eta^2 V_i), for losses in [low, high].

    r_{t,i} = (w_t . l_t - l_{t,i}) / (high - low), R_i is its sum over the rounds and V_i that of its squares; eta has
    a uniform prior on G values in (0, 1/2]. Because exp(x - x^2) <= 1 + x for x >= -1/2, the mean of exp(eta R_i -
    eta^2 V_i) over i and eta never rises above 1 (Koolen and van Erven, "Second-order quantile methods for experts and
    combinatorial games", COLT 2015, with a discrete prior on eta). So for every sequence of losses

        R_i <= min over eta of [log(N G) / eta + eta V_i],

    of order sqrt(V_i log(N G)). ``bound`` is that of the best expert, in units of the loss. For a mixture or a drawn
    expert, see ``adahedge``.

    Args:
        low: the least loss.
        high: the largest loss, above ``low``.

    Returns:
        The aggregation. Its state has ``regrets`` R (N,), ``variances`` V (N,), and ``excess``, the sum of the
        aggregate's losses minus w . l.

    Raises:
        ValueError: if the range is empty or infinite. ``update`` raises it for a loss outside the range.
    """
    width = read_range(low, high)

    def init(count: int) -> Params:
        regrets = start_regrets(count)
        return {"regrets": regrets, "variances": numbers([0.0] * count), "excess": numbers(0.0)}

    def update(state: Params, losses: Tensor, loss: float | None = None) -> Params:
        regrets, variances = state["regrets"].tolist(), state["variances"].tolist()
        found = read_losses(losses, len(regrets), loss)
        for place, one in enumerate(found):
            if not low <= one <= high:
                raise ValueError(f"the loss of expert {place} is {one:g}: losses must be from {low:g} to {high:g}")
        mean = weighted_mean(_weights(state).tolist(), found)
        gained = [(mean - one) / width for one in found]
        return {
            "regrets": numbers([regret + one for regret, one in zip(regrets, gained, strict=True)]),
            "variances": numbers([variance + one * one for variance, one in zip(variances, gained, strict=True)]),
            "excess": numbers(state["excess"].item() + (0.0 if loss is None else loss - mean)),
        }

    def bound(state: Params) -> float:
        regrets: list[float] = state["regrets"].tolist()
        variances: list[float] = state["variances"].tolist()
        cost = math.log(len(regrets) * len(RATES))
        best = max(regrets)
        ends = [variance for regret, variance in zip(regrets, variances, strict=True) if regret == best]
        return width * min(cost / rate + rate * variance for rate in RATES for variance in ends)

    def regret(state: Params) -> float:
        best: float = max(state["regrets"].tolist())
        return width * best + state["excess"].item()

    return Aggregation(init, _weights, update, bound, regret)


def _weights(state: Params) -> Tensor:
    pairs = zip(state["regrets"].tolist(), state["variances"].tolist(), strict=True)
    return weights_of([log_sum_exp([math.log(rate) + rate * r - rate * rate * v for rate in RATES]) for r, v in pairs])
