"""Sum the gradients of one meta-step over the replay samples of all ranks."""

from collections.abc import Sequence

from online_meta.batching.task_sum import SkippingSum
from online_meta.replay import ReplaySample
from online_meta.tree import add
from online_meta.types import Engine, Gather, MetaGrad, ReplayBuffer


def local_samples(engine: Engine, samples: Sequence[ReplaySample]) -> Sequence[ReplaySample]:
    """Return this rank's samples: every ``world``-th one, from index ``rank``."""
    return samples[engine.rank :: engine.world]


def distribute_samples(engine: Engine, buffer: ReplayBuffer, samples: Sequence[ReplaySample]) -> None:
    """Make each rank's own samples readable on that rank. Collective: all ranks must call it."""
    buffer.distribute([[sample.round for sample in samples[rank :: engine.world]] for rank in range(engine.world)])


def sum_gradients(
    engine: Engine, sum_tasks: SkippingSum, buffer: ReplayBuffer, samples: Sequence[ReplaySample]
) -> tuple[MetaGrad, float]:
    """Return the arguments of ``engine.apply`` for a meta-step on ``samples``. Collective: all ranks must call it.

    ``distribute_samples`` must have been called with the same ``samples``. Returns the weighted sum of the gradients
    and the sum of their shares.
    """
    if engine.gather is None:
        return _local_sum(engine, sum_tasks, buffer, local_samples(engine, samples))
    return _sum_in_order(engine, engine.gather, sum_tasks, buffer, samples)


def _local_sum(
    engine: Engine, sum_tasks: SkippingSum, buffer: ReplayBuffer, own: Sequence[ReplaySample]
) -> tuple[MetaGrad, float]:
    """Return this rank's sum; a rank without tasks contributes zeros and a share of 0."""
    return sum_tasks(engine.meta(), [buffer[sample.round] for sample in own], own)


def _sum_in_order(
    engine: Engine, gather: Gather, sum_tasks: SkippingSum, buffer: ReplayBuffer, samples: Sequence[ReplaySample]
) -> tuple[MetaGrad, float]:
    """Return the sum over all ranks, added sample by sample, so that the bits do not depend on the number of ranks."""
    total, total_share = _local_sum(engine, sum_tasks, buffer, [])
    for first in range(0, len(samples), engine.world):
        together = samples[first : first + engine.world]
        own = together[engine.rank : engine.rank + 1]
        for _, (found, share) in zip(together, gather(*_local_sum(engine, sum_tasks, buffer, own)), strict=False):
            total, total_share = add(total, found), total_share + share
    return total, total_share
