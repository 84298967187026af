"""Track the best expert by AdaHedge's learning rate: for any losses, where the best expert changes over time."""

import math

import torch
from torch import Tensor

from online_meta.aggregation import (
    log_sum_exp,
    numbers,
    read_losses,
    start_regrets,
    weighted_mean,
    weights_of,
)
from online_meta.types import Aggregation, Params


def build(*, rate: float = 0.1) -> Aggregation:
    """Return the weights of fixed share with the learning rate of AdaHedge, for losses of any finite range.

    With the shares p_t, uniform in the first round, the mix loss is m_t = -(1 / eta_t) log sum_i p_i exp(-eta_t l_i),
    the gap of a round is delta_t = max(0, loss_t - m_t), Delta_t is the sum of the gaps, and eta_t = log N /
    Delta_{t-1}, as in ``adahedge``; ``loss_t`` is that of the mixture, or w . l where it is not known. After a round,

        v_i ~ p_i exp(-eta_t l_i),   u_i ~ v_i^(eta_{t+1} / eta_t),   p_i = (1 - alpha_t) u_i + alpha_t / N

    (Cesa-Bianchi, Gaillard, Lugosi and Stoltz, "Mirror descent meets fixed share (and feels no regret)", NIPS 2012),
    with alpha_t = ``rate`` / (t + 1) after t rounds, a rate that falls so that the regret to a single expert grows by
    no more than log T (Adamskiy, Koolen, Chernov and Vovk, "A closer look at adaptive regret", JMLR 2016).

    For every sequence of losses and every sequence of experts, the cumulative loss is at most that of the sequence plus

        Delta_T + log N / eta_T + sum_t log(1 / (1 - alpha_t)) / eta_{t+1} + sum over the switches of
        log(N / alpha_t) / eta_{t+1},

    because m_t = l_i + log(v_i / p_i) / eta_t, and log(1 / u_i) / eta_{t+1} <= log(1 / v_i) / eta_t + (1 / eta_{t+1} -
    1 / eta_t) log N, and a share is at least (1 - alpha) u_i and alpha / N. The last sum needs switches after the first
    round with a gap: until then Delta is 0, the experts with the least cumulative losses have equal weights, and at its
    end u_i ~ exp(-eta L_i). ``regret`` and ``bound`` are those of a single expert.

    Args:
        rate: how much is shared, in (0, 1].

    Returns:
        The aggregation. Its state has ``regrets`` (N,), the aggregate's cumulative loss minus L_i; ``log_shares`` (N,);
        and the scalars ``gap``, which is Delta, ``spent``, the sum over t in the bound, and ``rounds``.

    Raises:
        ValueError: if ``rate`` is out of range.
    """
    if not 0 < rate <= 1:
        raise ValueError(f"rate is {rate}: it is above 0 and at most 1")
    return Aggregation(
        init=lambda count: {
            "regrets": start_regrets(count),
            "log_shares": numbers([-math.log(count)] * count),
            "gap": numbers(0.0),
            "spent": numbers(0.0),
            "rounds": torch.tensor(0),
        },
        weights=_weights,
        update=lambda state, losses, loss=None: _update(state, losses, loss, rate),
        bound=lambda state: 2 * state["gap"].item() + state["spent"].item(),
        regret=lambda state: max(state["regrets"].tolist()),
    )


def _weights(state: Params) -> Tensor:
    if state["gap"].item() > 0:
        return weights_of(state["log_shares"].tolist())
    regrets = state["regrets"].tolist()
    return weights_of([0.0 if regret == max(regrets) else -math.inf for regret in regrets])


def _update(state: Params, losses: Tensor, loss: float | None, rate: float) -> Params:
    regrets, gap, rounds = state["regrets"].tolist(), state["gap"].item(), int(state["rounds"]) + 1
    found = read_losses(losses, len(regrets), loss)
    mean, least, size = weighted_mean(_weights(state).tolist(), found), min(found), math.log(len(found))
    loss = mean if loss is None else loss
    after = [regret - one for regret, one in zip(regrets, found, strict=True)]
    if gap > 0:
        scores = [
            share - size / gap * (one - least) for share, one in zip(state["log_shares"].tolist(), found, strict=True)
        ]
        mix = least - log_sum_exp(scores) * gap / size
    else:
        mix = max(regrets) - max(after)  # where eta is infinite
    total = gap + min(max(min(loss, mean) - mix, 0.0), max(found) - least)
    moved = [regret + (loss - one) for regret, one in zip(regrets, found, strict=True)]
    changed: Params = {"regrets": numbers(moved), "gap": numbers(total), "rounds": torch.tensor(rounds)}
    if total == 0:
        return {**state, **changed}
    tempered = (
        [gap / total * score for score in scores] if gap > 0 else [size / total * (one - max(after)) for one in after]
    )
    part = rate / (rounds + 1)
    return {
        **changed,
        "log_shares": numbers(_share(tempered, part)),
        "spent": state["spent"] - math.log1p(-part) * total / size,
    }


def _share(scores: list[float], part: float) -> list[float]:
    """Return the log of (1 - part) u_i + part / N, u being proportional to exp(scores)."""
    norm = log_sum_exp(scores)
    kept, rest = math.log1p(-part), math.log(part / len(scores))
    return [log_sum_exp([kept + score - norm, rest]) for score in scores]
