"""Clip the losses that an aggregation sees: at a running threshold, or to a known range."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from online_meta.aggregation import numbers, weighted_mean
from online_meta.types import Aggregation, Params

RECENT, SEEN, EXCESS, CLIPPED = "clip.recent", "clip.seen", "clip.excess", "clip.clipped"
"""What is added to the state of the aggregation."""


class Clipping(NamedTuple):
    """Where losses are clipped: at ``factor`` times a quantile of those of a usual expert in the latest rounds.

    Attributes:
        quantile: of the experts' median losses, one for each round, in [0, 1].
        factor: what it is multiplied by, at least 1.
        rounds: how many of the latest rounds count, the round itself among them, at least 1.
    """

    quantile: float = 0.95
    factor: float = 4.0
    rounds: int = 200


USUAL = Clipping()
"""Where losses are clipped by default."""


def clip_running(aggregation: Aggregation, clipping: Clipping = USUAL) -> Aggregation:
    """Return the aggregation of losses that are clipped at a running threshold, so that one huge loss does no harm.

    In round t every loss above C_t counts as C_t. C_t is ``factor`` times the ``quantile`` of the medians of the
    experts' absolute losses in the latest ``rounds`` rounds, that of round t itself included; as long as this is 0,
    nothing is clipped. Weights, ``regret`` and
    ``bound`` are those of clipped losses.

    An expert whose loss was clipped has weight 0 in the next round, unless all were clipped: its answer is far off, and
    even the smallest weight would spoil a mean of answers. The aggregation keeps its own weights, so that the
    expert has weight again as soon as its loss is usual.

    The loss of a mixture, clipped, can be above the weighted mean w . l of clipped losses under the aggregation's own
    weights, which is what the theorem charges. What it is above is added up, and added to the bound: regret <= bound
    holds for every sequence of losses.

    Raises:
        ValueError: if a part of ``clipping`` is out of range.
    """
    if not 0 <= clipping.quantile <= 1 or not clipping.factor >= 1 or clipping.rounds < 1:
        raise ValueError(f"{clipping}: quantile is in [0, 1], factor at least 1, and rounds at least 1")

    def limit(state: Params, losses: Tensor) -> tuple[Params, float]:
        recent, seen = state[RECENT].clone(), int(state[SEEN])
        recent[seen % clipping.rounds] = losses.double().abs().median()
        usual = float(recent[: min(seen + 1, clipping.rounds)].quantile(clipping.quantile))
        return {RECENT: recent, SEEN: torch.tensor(seen + 1)}, clipping.factor * usual or torch.inf

    start = {RECENT: torch.zeros(clipping.rounds, dtype=torch.float64), SEEN: torch.tensor(0)}
    return _clip(aggregation, start, limit)


def clip_to_range(aggregation: Aggregation, low: float, high: float) -> Aggregation:
    """Return the aggregation of losses that are clipped to [low, high]; for its bound, see ``clip_running``."""
    return _clip(aggregation, {}, lambda state, losses: ({}, high), low)


def _clip(
    aggregation: Aggregation,
    start: Params,
    limit: Callable[[Params, Tensor], tuple[Params, float]],
    low: float = -torch.inf,
) -> Aggregation:
    """Return the aggregation of losses clipped to [low, high].

    ``limit`` returns what follows the entries of ``start`` in the state, and the round's ``high``.
    """

    def weights(state: Params) -> Tensor:
        own, left_out = aggregation.weights(state), _find_left_out(state)
        if left_out is None:
            return own
        kept = own.masked_fill(left_out, 0.0)
        total = math.fsum(kept.tolist())
        return kept / total if total > 0 else own

    def update(state: Params, losses: Tensor, loss: float | None = None) -> Params:
        own, high = limit(state, losses)
        clipped = losses.double().clamp(low, high)
        excess = numbers(0.0)
        if loss is None and _find_left_out(state) is not None:
            loss = weighted_mean(weights(state).tolist(), clipped.tolist())
        if loss is not None:
            loss = min(max(loss, low), high)
            mean = weighted_mean(aggregation.weights(state).tolist(), clipped.tolist())
            excess = numbers(max(loss - mean, 0.0))
        after = aggregation.update(state, clipped, loss)
        return {**after, **own, CLIPPED: (losses.double() > high).long(), EXCESS: state[EXCESS] + excess}

    return Aggregation(
        init=lambda count: {
            **aggregation.init(count),
            **start,
            CLIPPED: torch.zeros(count, dtype=torch.int64),
            EXCESS: numbers(0.0),
        },
        weights=weights,
        update=update,
        bound=lambda state: aggregation.bound(state) + state[EXCESS].item(),
        regret=aggregation.regret,
    )


def _find_left_out(state: Params) -> Tensor | None:
    """Return which experts have no weight, (N,), because their last losses were clipped; None if all have some."""
    clipped = state[CLIPPED].bool()
    return clipped if clipped.any() and not clipped.all() else None
