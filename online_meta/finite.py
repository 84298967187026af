"""Meta-gradients over tasks of which some may be poison: finite numbers whose gradient is not."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from online_meta.draws import Pick
from online_meta.summing import TaskSum
from online_meta.tree import add, scale, zeros
from online_meta.types import Meta, MetaGrad, MetaGradient, Task

FiniteSum = Callable[[Meta, Sequence[Task], Sequence[Pick]], tuple[MetaGrad, float]]
"""(meta, tasks, their picks) -> the weighted sum of the finite gradients, and the sum of their shares."""


def sum_finite(together: TaskSum) -> FiniteSum:
    """Return ``together`` without the tasks whose loss or gradient is not finite, and the shares that are left.

    One such task, revisited by replay, would otherwise void every meta-step that it is part of. Only a sum
    that is not finite is taken apart, so it costs nothing where there is no such task. Of no tasks at all
    the sum is zeros and the shares are 0.
    """

    def summed(meta: Meta, tasks: Sequence[Task], picks: Sequence[Pick]) -> tuple[MetaGrad, float]:
        if tasks:
            total = together(meta, tasks, [pick.weight for pick in picks])
            if is_finite(total):
                return total, sum(pick.share for pick in picks)
        return _one_by_one(together.gradient, meta, tasks, picks, lambda gradient: None)

    return summed


def sum_measured(
    gradient: MetaGradient, measure: Callable[[MetaGrad], Tensor], told: Callable[[list[float]], None]
) -> FiniteSum:
    """Return what ``sum_finite`` does, one by one: ``told`` hears what ``measure`` says of each task's gradient."""

    def tell(found: MetaGrad) -> None:
        values = measure(found).double()
        told((values if is_finite(found) else torch.full_like(values, torch.nan)).tolist())

    def summed(meta: Meta, tasks: Sequence[Task], picks: Sequence[Pick]) -> tuple[MetaGrad, float]:
        return _one_by_one(gradient, meta, tasks, picks, tell)

    return summed


def _one_by_one(
    gradient: MetaGradient,
    meta: Meta,
    tasks: Sequence[Task],
    picks: Sequence[Pick],
    tell: Callable[[MetaGrad], None],
) -> tuple[MetaGrad, float]:
    some = next(iter(meta.weights.values()))
    total, left = MetaGrad(some.new_zeros(()), zeros(meta)), 0.0
    for task, pick in zip(tasks, picks, strict=True):
        found = gradient(meta, task)
        tell(found)
        share = scale(found, pick.weight)
        if is_finite(share):
            total, left = add(total, share), left + pick.share
    return total, left


def is_finite(*trees: object) -> bool:
    """Return whether all tensors of the trees are finite."""
    return all(bool(torch.isfinite(leaf).all()) for leaf in tree_leaves(trees))
