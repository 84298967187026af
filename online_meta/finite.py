"""Meta-gradients over tasks of which some may be poison: finite numbers whose gradient is not."""

from collections.abc import Callable, Sequence

import torch
from torch.utils._pytree import tree_leaves

from online_meta.summing import TaskSum
from online_meta.tree import add, scale, zeros
from online_meta.types import Meta, MetaGrad, Task

FiniteSum = Callable[[Meta, Sequence[Task], Sequence[float]], tuple[MetaGrad, float]]
"""(meta, tasks, weights) -> the weighted sum of the finite gradients, and the sum of their weights."""


def sum_finite(together: TaskSum) -> FiniteSum:
    """Return ``together`` without the tasks whose loss or gradient is not finite, and the weight that is left.

    One such task, revisited by replay, would otherwise void every meta-step that it is part of. Only a sum
    that is not finite is taken apart, so it costs nothing where there is no such task. Of no tasks at all
    the sum is zeros and the weight 0.
    """

    def summed(meta: Meta, tasks: Sequence[Task], weights: Sequence[float]) -> tuple[MetaGrad, float]:
        if tasks:
            total = together(meta, tasks, weights)
            if _is_finite(total):
                return total, sum(weights)
        some = next(iter(meta.weights.values()))
        total, left = MetaGrad(some.new_zeros(()), zeros(meta)), 0.0
        for task, weight in zip(tasks, weights, strict=True):
            share = scale(together.gradient(meta, task), weight)
            if _is_finite(share):
                total, left = add(total, share), left + weight
        return total, left

    return summed


def _is_finite(tree: MetaGrad) -> bool:
    return all(bool(torch.isfinite(leaf).all()) for leaf in tree_leaves(tree))
