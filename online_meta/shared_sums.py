"""What the ranks of an engine sum over the picks of one meta-step."""

from collections.abc import Sequence

from online_meta.draws import Pick
from online_meta.finite import FiniteSum
from online_meta.tree import add
from online_meta.types import Engine, Gather, MetaGrad, Past


def own_picks(engine: Engine, picks: Sequence[Pick]) -> Sequence[Pick]:
    """Return the picks that are this rank's: every ``world``-th."""
    return picks[engine.rank :: engine.world]


def hand_out(engine: Engine, past: Past, picks: Sequence[Pick]) -> None:
    """Make each rank's own picks readable there; all ranks have to call it."""
    past.hand_out([[pick.round for pick in picks[rank :: engine.world]] for rank in range(engine.world)])


def sum_picks(engine: Engine, summed: FiniteSum, past: Past, picks: Sequence[Pick]) -> tuple[MetaGrad, float]:
    """Return what ``engine.apply`` takes to step on ``picks``, which were handed out; all ranks have to call it."""
    if engine.gather is None:
        return _sum(engine, summed, past, own_picks(engine, picks))
    return _sum_in_order(engine, engine.gather, summed, past, picks)


def _sum(engine: Engine, summed: FiniteSum, past: Past, own: Sequence[Pick]) -> tuple[MetaGrad, float]:
    """Return this rank's sum; one without a task takes part with nothing: zeros, and a share of 0."""
    return summed(engine.meta(), [past[pick.round] for pick in own], own)


def _sum_in_order(
    engine: Engine, gather: Gather, summed: FiniteSum, past: Past, picks: Sequence[Pick]
) -> tuple[MetaGrad, float]:
    """Return the sum over all ranks, added up pick by pick: the same bits whatever their number is."""
    total, all_shares = _sum(engine, summed, past, [])
    for first in range(0, len(picks), engine.world):
        together = picks[first : first + engine.world]
        own = together[engine.rank : engine.rank + 1]
        for _, (found, share) in zip(together, gather(*_sum(engine, summed, past, own)), strict=False):
            total, all_shares = add(total, found), all_shares + share
    return total, all_shares
