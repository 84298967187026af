"""Fixed share: the aggregating algorithm for log losses whose best expert changes over time."""

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from online_meta.aggregation import log_sum_exp, numbers, read_losses, start_regrets, weights_of
from online_meta.types import Aggregation, Params

RATES = (0.0, *(2.0**-power for power in range(14, 0, -1)))
"""The switching rates that are averaged over by default: 0, and 2^-14 to 1/2."""


def build(*, rates: Sequence[float] = RATES, switches: int = 10) -> Aggregation:
    """Return the weights of fixed share, with Bayes' rule over its switching rate alpha as well, for log losses.

    For each of G rates, expert i has the share v_i after Bayes' rule, and (1 - alpha) v_i + sum_{j != i} alpha v_j /
    (N - 1) in the next round (Herbster and Warmuth, "Tracking the best expert", Machine Learning 1998). A rate's
    weight starts as 1/G and is multiplied by exp(-loss) of its mixture in each round. The aggregate is the mixture over
    rates and experts, whose loss is -log sum_i w_i exp(-l_i); see ``bayes`` for rows.

    For every sequence of T rounds of losses and every sequence of experts with k switches, the cumulative loss of the
    aggregate is at most that of the sequence of experts plus

        log N + log G + k log(N - 1) + min over alpha of [k log(1 / alpha) + (T - 1 - k) log(1 / (1 - alpha))],

    because the sequence has at least the prior probability exp(-this). ``regret`` is that against the best sequence
    with at most ``switches`` switches, chosen in hindsight; ``bound`` is the largest of the bounds for k = 0 to
    ``switches``. With ``switches`` = 0 the sequence is a single expert.

    Args:
        rates: the values of alpha, in [0, 1/2]: the chance that the best expert changes in a round.
        switches: the number of switches that ``regret`` and ``bound`` allow, at least 0. The weights do not depend on
            it.

    Returns:
        The aggregation. Its state has ``log_weights`` (G, N) of the next round; ``regrets`` (``switches`` + 1, N),
        against the best sequence with at most k switches that ends with expert i; and the number of ``rounds``.

    Raises:
        ValueError: if an option is out of range.
    """
    if not rates or not all(0 <= rate <= 0.5 for rate in rates) or switches < 0:
        raise ValueError(
            f"rates is {[*rates]} and switches is {switches}: it needs at least one rate, each in [0, 1/2], and at "
            "least 0 switches"
        )

    def init(count: int) -> Params:
        start_regrets(count)
        return {
            "log_weights": numbers([[-math.log(len(rates) * count)] * count] * len(rates)),
            "regrets": numbers([[0.0] * count] * (switches + 1)),
            "rounds": torch.tensor(0),
        }

    return Aggregation(
        init,
        _weights,
        update=partial(_update, rates),
        bound=lambda state: _largest_bound(state, rates),
        regret=lambda state: state["regrets"][-1].max().item(),
    )


def _weights(state: Params) -> Tensor:
    return weights_of([log_sum_exp(column) for column in state["log_weights"].T.tolist()])


def _update(rates: Sequence[float], state: Params, losses: Tensor, loss: float | None = None) -> Params:
    rows = state["log_weights"].tolist()
    found = read_losses(losses, len(rows[0]), loss)
    after = [[value - one for value, one in zip(row, found, strict=True)] for row in rows]
    total = log_sum_exp([value for row in after for value in row])
    posterior = [[value - total for value in row] for row in after]
    loss = -total if loss is None else loss
    return {
        "log_weights": numbers([_share(row, rate) for row, rate in zip(posterior, rates, strict=True)]),
        "regrets": numbers(_extend(state["regrets"].tolist(), [loss - one for one in found])),
        "rounds": state["rounds"] + 1,
    }


def _share(row: list[float], rate: float) -> list[float]:
    """Return the log of (1 - rate) v_i + rate / (N - 1) sum_{j != i} v_j, ``row`` being log v."""
    count = len(row)
    if count == 1 or rate == 0:
        return row
    part = rate / (count - 1)
    from_all = math.log(part) + log_sum_exp(row)
    kept = 1 - rate - part
    return [log_sum_exp([math.log(kept) + value, from_all]) if kept > 0 else from_all for value in row]


def _extend(regrets: list[list[float]], gained: list[float]) -> list[list[float]]:
    """Return the regrets after a round: a sequence with at most k switches stays with its expert or uses a switch."""
    found = []
    for k, row in enumerate(regrets):
        reached = max(regrets[k - 1]) if k else -math.inf
        found.append([max(stay, reached) + one for stay, one in zip(row, gained, strict=True)])
    return found


def _largest_bound(state: Params, rates: Sequence[float]) -> float:
    """Return the largest bound over the numbers of switches that are allowed and fit in the rounds so far."""
    (most, count), rounds = state["regrets"].shape, int(state["rounds"])
    return max(_bound(k, count, rounds, rates) for k in range(min(most, max(rounds, 1)) if count > 1 else 1))


def _bound(k: int, count: int, rounds: int, rates: Sequence[float]) -> float:
    """Return the bound of the regret against a sequence of experts with k switches."""
    if count == 1:
        return 0.0
    stays = max(rounds - 1, 0) - k
    costs = [-stays * math.log1p(-rate) - (k * math.log(rate) if k else 0.0) for rate in rates if rate > 0 or k == 0]
    return math.log(count * len(rates)) + k * math.log(count - 1) + min(costs, default=math.inf)
