"""Exponential weights for the squared loss in a known range."""

import math

from torch import Tensor

from online_meta.aggregation import exponential_weights, log_sum_exp, numbers, read_losses, read_range, start_regrets
from online_meta.types import Aggregation, Params

ROUNDING = 1e-6
"""The relative error of a loss in float32 that is accepted."""


def build(*, low: float, high: float) -> Aggregation:
    """Return w_i proportional to exp(-eta L_i) with eta = 1 / (2 (b - a)^2), for squared losses of values in [a, b].

    L_i is the cumulative loss of expert i. The aggregate is the weighted mean of the predictions. For predictions and
    targets in [a, b], exp(-eta (p - y)^2) is concave in p, so the mean's loss is at most
    -(1 / eta) log sum_i w_i exp(-eta l_i), and its regret at most 2 (b - a)^2 log N for every sequence (Kivinen and
    Warmuth, "Averaging expert predictions", EuroCOLT 1999). The same holds for the mean of squared errors over rows and
    dimensions, but not for their sum.

    Args:
        low: a, in units of y.
        high: b, above ``low``.

    Returns:
        The aggregation. Its state has ``regrets`` (N,): the aggregate's cumulative loss minus L_i.

    Raises:
        ValueError: if the range is empty or infinite. ``update`` raises it for a loss outside [0, (b - a)^2].
    """
    most = read_range(low, high) ** 2
    rate = 1 / (2 * most)

    def init(count: int) -> Params:
        return {"regrets": start_regrets(count)}

    def update(state: Params, losses: Tensor, loss: float | None = None) -> Params:
        regrets = state["regrets"].tolist()
        found = read_losses(losses, len(regrets), loss)
        for place, one in enumerate(found):
            if not 0 <= one <= most * (1 + ROUNDING):
                raise ValueError(
                    f"the loss of expert {place} is {one:g}: squared losses of values from {low:g} to {high:g} are "
                    f"from 0 to {most:g}; clip predictions and targets to the range"
                )
        if loss is None:
            scores = [rate * (regret - max(regrets)) for regret in regrets]
            after = [score - rate * one for score, one in zip(scores, found, strict=True)]
            loss = (log_sum_exp(scores) - log_sum_exp(after)) / rate
        return {"regrets": numbers([r + (loss - one) for r, one in zip(regrets, found, strict=True)])}

    return Aggregation(
        init,
        weights=lambda state: exponential_weights(state["regrets"].tolist(), rate),
        update=update,
        bound=lambda state: 2 * most * math.log(len(state["regrets"])),
        regret=lambda state: max(state["regrets"].tolist()),
    )
