"""What the ranks of an engine sum over the picks of one meta-step."""

from collections.abc import Sequence

from online_meta.batching.task_sum import SkippingSum
from online_meta.replay import ReplaySample
from online_meta.tree import add
from online_meta.types import Engine, Gather, MetaGrad, ReplayBuffer


def local_samples(engine: Engine, samples: Sequence[ReplaySample]) -> Sequence[ReplaySample]:
    """Return the picks that are this rank's: every ``world``-th."""
    return samples[engine.rank :: engine.world]


def distribute_samples(engine: Engine, buffer: ReplayBuffer, samples: Sequence[ReplaySample]) -> None:
    """Make each rank's own picks readable there; all ranks have to call it."""
    buffer.distribute([[sample.round for sample in samples[rank :: engine.world]] for rank in range(engine.world)])


def sum_gradients(
    engine: Engine, sum_tasks: SkippingSum, buffer: ReplayBuffer, samples: Sequence[ReplaySample]
) -> tuple[MetaGrad, float]:
    """Return what ``engine.apply`` takes to step on ``samples``, which were handed out; all ranks have to call it."""
    if engine.gather is None:
        return _local_sum(engine, sum_tasks, buffer, local_samples(engine, samples))
    return _sum_in_order(engine, engine.gather, sum_tasks, buffer, samples)


def _local_sum(
    engine: Engine, sum_tasks: SkippingSum, buffer: ReplayBuffer, own: Sequence[ReplaySample]
) -> tuple[MetaGrad, float]:
    """Return this rank's sum; one without a task takes part with nothing: zeros, and a share of 0."""
    return sum_tasks(engine.meta(), [buffer[sample.round] for sample in own], own)


def _sum_in_order(
    engine: Engine, gather: Gather, sum_tasks: SkippingSum, buffer: ReplayBuffer, samples: Sequence[ReplaySample]
) -> tuple[MetaGrad, float]:
    """Return the sum over all ranks, added up pick by pick: the same bits whatever their number is."""
    total, total_share = _local_sum(engine, sum_tasks, buffer, [])
    for first in range(0, len(samples), engine.world):
        together = samples[first : first + engine.world]
        own = together[engine.rank : engine.rank + 1]
        for _, (found, share) in zip(together, gather(*_local_sum(engine, sum_tasks, buffer, own)), strict=False):
            total, total_share = add(total, found), total_share + share
    return total, total_share
