"""The aggregating algorithm for log losses: Bayes' rule over experts."""

import math
from collections.abc import Sequence

from torch import Tensor

from online_meta.aggregation import exponential_weights, log_sum_exp, numbers, read_losses, start_regrets
from online_meta.types import Aggregation, Params


def build(*, prior: Sequence[float] | None = None) -> Aggregation:
    """Return w_i proportional to prior_i exp(-L_i), L_i being the cumulative log loss of expert i, in nats.

    The aggregate is the mixture sum_i w_i p_i of the predicted densities, whose loss is -log sum_i w_i exp(-l_i). For
    every sequence of losses, its cumulative loss is -log sum_i prior_i exp(-L_i) <= L_i + log(1 / prior_i) for each i:
    regret at most log N with a uniform prior (Vovk, "A game of prediction with expert advice", JCSS 1998, with
    eta = 1; DeSantis, Markowsky and Wegman, FOCS 1988).

    It also holds where a round's loss is the mean of -log sum_i w_i p_i(y_r) over rows r, because exp(-loss) is then a
    concave function of the weights. It does not hold for the sum over rows, unless the joint densities of the rows are
    mixed.

    An expert whose loss is +inf has weight 0 from then on.

    Args:
        prior: positive numbers that sum to 1, one per expert; None for 1/N each.

    Returns:
        The aggregation. Its state has ``regrets`` (N,): the aggregate's cumulative loss minus L_i.

    Raises:
        ValueError: if ``prior`` is no distribution. ``init`` raises it if the prior has another number of experts,
            ``update`` if every expert has had an infinite loss.
    """
    if prior is not None and not (min(prior, default=0) > 0 and math.isclose(math.fsum(prior), 1)):
        raise ValueError(f"prior is {[*prior]}: it needs one positive number per expert, with the sum 1")

    def init(count: int) -> Params:
        if prior is not None and len(prior) != count:
            raise ValueError(f"prior has {len(prior)} numbers: there are {count} experts")
        return {"regrets": start_regrets(count)}

    def prior_of(count: int) -> Sequence[float]:
        return [1 / count] * count if prior is None else prior

    def weights(state: Params) -> Tensor:
        regrets = state["regrets"].tolist()
        return exponential_weights(regrets, prior=prior_of(len(regrets)))

    def update(state: Params, losses: Tensor, loss: float | None = None) -> Params:
        regrets = state["regrets"].tolist()
        found = read_losses(losses, len(regrets), loss, infinite=True)
        largest = max(regrets)
        scores = [r - largest + math.log(p) for r, p in zip(regrets, prior_of(len(regrets)), strict=True)]
        left = log_sum_exp([score - one for score, one in zip(scores, found, strict=True)])
        if left == -math.inf:
            raise ValueError(f"each of the {len(found)} experts has had an infinite loss: no expert can have weight")
        loss = log_sum_exp(scores) - left if loss is None else loss
        return {"regrets": numbers([r + (loss - one) for r, one in zip(regrets, found, strict=True)])}

    def bound(state: Params) -> float:
        regrets = state["regrets"].tolist()
        best = max(regrets)
        return min(-math.log(p) for r, p in zip(regrets, prior_of(len(regrets)), strict=True) if r == best)

    return Aggregation(init, weights, update, bound, regret=lambda state: max(state["regrets"].tolist()))
