"""Meta-gradients over tasks of which some may be poison: finite numbers whose gradient is not."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from online_meta.draws import ReplaySample
from online_meta.summing import TaskSum
from online_meta.tree import add, scale, zeros
from online_meta.types import Meta, MetaGrad, MetaGradient, Task

SkippingSum = Callable[[Meta, Sequence[Task], Sequence[ReplaySample]], tuple[MetaGrad, float]]
"""(meta, tasks, their picks) -> the weighted sum of the finite gradients, and the sum of their shares."""


def sum_skipping_nonfinite(task_sum: TaskSum) -> SkippingSum:
    """Return ``task_sum`` without the tasks whose loss or gradient is not finite, and the shares that are left.

    One such task, revisited by replay, would otherwise void every meta-step that it is part of. Only a sum
    that is not finite is taken apart, so it costs nothing where there is no such task. Of no tasks at all
    the sum is zeros and the shares are 0.
    """

    def sum_tasks(meta: Meta, tasks: Sequence[Task], samples: Sequence[ReplaySample]) -> tuple[MetaGrad, float]:
        if tasks:
            total = task_sum(meta, tasks, [sample.weight for sample in samples])
            if is_finite(total):
                return total, sum(sample.share for sample in samples)
        return _one_by_one(task_sum.gradient, meta, tasks, samples, lambda gradient: None)

    return sum_tasks


def sum_with_measurements(
    gradient: MetaGradient, measure: Callable[[MetaGrad], Tensor], on_measured: Callable[[list[float]], None]
) -> SkippingSum:
    """Return what ``sum_skipping_nonfinite`` does, one by one: ``on_measured`` hears what ``measure`` says of each task's gradient."""

    def report(found: MetaGrad) -> None:
        values = measure(found).double()
        on_measured((values if is_finite(found) else torch.full_like(values, torch.nan)).tolist())

    def sum_tasks(meta: Meta, tasks: Sequence[Task], samples: Sequence[ReplaySample]) -> tuple[MetaGrad, float]:
        return _one_by_one(gradient, meta, tasks, samples, report)

    return sum_tasks


def _one_by_one(
    gradient: MetaGradient,
    meta: Meta,
    tasks: Sequence[Task],
    samples: Sequence[ReplaySample],
    report: Callable[[MetaGrad], None],
) -> tuple[MetaGrad, float]:
    some = next(iter(meta.weights.values()))
    total, total_share = MetaGrad(some.new_zeros(()), zeros(meta)), 0.0
    for task, sample in zip(tasks, samples, strict=True):
        found = gradient(meta, task)
        report(found)
        share = scale(found, sample.weight)
        if is_finite(share):
            total, total_share = add(total, share), total_share + sample.share
    return total, total_share


def is_finite(*trees: object) -> bool:
    """Return whether all tensors of the trees are finite."""
    return all(bool(torch.isfinite(leaf).all()) for leaf in tree_leaves(trees))
