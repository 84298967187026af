"""Sum the gradients of one meta-step over the replay samples of all ranks."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from torch.utils._pytree import tree_map

from online_meta.batching.failures import TaskFailures, is_task_failure
from online_meta.batching.task_sum import SkippingSum
from online_meta.replay import ReplaySample
from online_meta.replay._task_draw import Tasks
from online_meta.tree import add, zeros
from online_meta.types import Engine, Gather, Meta, MetaGrad, ReplayBuffer, Task


def local_samples(engine: Engine, samples: Sequence[ReplaySample]) -> Sequence[ReplaySample]:
    """Return this rank's samples: every ``world``-th one, from index ``rank``."""
    return samples[engine.rank :: engine.world]


def distribute_samples(engine: Engine, buffer: ReplayBuffer, samples: Sequence[ReplaySample]) -> None:
    """Make each rank's own samples readable on that rank. Collective: all ranks must call it."""
    buffer.distribute([[sample.round for sample in samples[rank :: engine.world]] for rank in range(engine.world)])


class GradientSum(NamedTuple):
    """How a learner sums gradients.

    Attributes:
        sum_tasks: sums the gradients of this rank's tasks.
        failures: collects the model's exceptions; None to let them propagate.
    """

    sum_tasks: SkippingSum
    failures: TaskFailures | None = None


def sum_gradients(
    engine: Engine, gradient_sum: GradientSum, tasks: Tasks, samples: Sequence[ReplaySample]
) -> tuple[MetaGrad, float]:
    """Return the arguments of ``engine.apply`` for a meta-step on ``samples``. Collective: all ranks must call it.

    ``distribute_samples`` must have been called with the same ``samples``. Returns the weighted sum of the gradients
    and the sum of their shares. If the model raises an exception on a task of one rank and the learner collects
    failures, the sum is not finite, so ``engine.apply`` makes no step on any rank.
    """
    if engine.gather is None:
        return _local_sum(engine, gradient_sum, tasks, local_samples(engine, samples))
    return _sum_in_order(engine, engine.gather, gradient_sum, tasks, samples)


def _local_sum(
    engine: Engine, gradient_sum: GradientSum, past: Tasks, own: Sequence[ReplaySample]
) -> tuple[MetaGrad, float]:
    """Return this rank's sum; a rank without tasks contributes zeros and a share of 0."""
    meta, tasks = engine.meta(), past.gather([sample.round for sample in own])
    try:
        return gradient_sum.sum_tasks(meta, tasks, own)
    except Exception as error:
        if gradient_sum.failures is None or not is_task_failure(error):
            raise
        if not _add_failures(gradient_sum, gradient_sum.failures, meta, tasks, own):
            raise  # Each task succeeds alone: no task is to blame.
    nothing: Meta = tree_map(lambda leaf: leaf * math.nan, zeros(meta))
    return MetaGrad(next(iter(meta.weights.values())).new_full((), math.nan), nothing), 0.0


def _add_failures(
    gradient_sum: GradientSum, failures: TaskFailures, meta: Meta, tasks: Sequence[Task], own: Sequence[ReplaySample]
) -> bool:
    """Try each task alone, and add the exceptions to ``failures``; return whether there are any."""
    before = len(failures.found)
    for task, sample in zip(tasks, own, strict=True):
        try:
            gradient_sum.sum_tasks(meta, [task], [sample])
        except Exception as error:
            if not is_task_failure(error):
                raise
            failures.add(sample.round, error)
    return len(failures.found) > before or any(sample.round in failures.found for sample in own)


def _sum_in_order(
    engine: Engine, gather: Gather, gradient_sum: GradientSum, tasks: Tasks, samples: Sequence[ReplaySample]
) -> tuple[MetaGrad, float]:
    """Return the sum over all ranks, added sample by sample, so that the bits do not depend on the number of ranks."""
    total, total_share = _local_sum(engine, gradient_sum, tasks, [])
    for first in range(0, len(samples), engine.world):
        together = samples[first : first + engine.world]
        own = together[engine.rank : engine.rank + 1]
        for _, (found, share) in zip(together, gather(*_local_sum(engine, gradient_sum, tasks, own)), strict=False):
            total, total_share = add(total, found), total_share + share
    return total, total_share
