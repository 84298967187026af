"""From the meta-gradient of one task to that of many."""

from collections.abc import Callable, Sequence

from online_meta.tree import add, scale
from online_meta.types import Meta, MetaGrad, MetaGradient, Task


def sum_over_tasks(gradient: MetaGradient) -> Callable[[Meta, Sequence[Task], Sequence[float]], MetaGrad]:
    """Return (meta, tasks, weights) -> sum_i weights_i * gradient(meta, task_i), summed in the order given."""

    def summed(meta: Meta, tasks: Sequence[Task], weights: Sequence[float]) -> MetaGrad:
        total: MetaGrad | None = None
        for task, weight in zip(tasks, weights, strict=True):
            share = gradient(meta, task)
            share = share if weight == 1.0 else scale(share, weight)
            total = share if total is None else add(total, share)
        if total is None:
            raise ValueError("a meta-gradient over no tasks is not defined: give one task or more")
        return total

    return summed


def over_tasks(gradient: MetaGradient) -> Callable[[Meta, Sequence[Task]], MetaGrad]:
    """Return (meta, tasks) -> the mean loss and meta-gradient over a list of one task or more.

    The tasks may differ in shape. Raises ``ValueError`` for an empty list.
    """
    summed = sum_over_tasks(gradient)

    def mean(meta: Meta, tasks: Sequence[Task]) -> MetaGrad:
        return scale(summed(meta, tasks, [1.0] * len(tasks)), 1.0 / max(len(tasks), 1))

    return mean
