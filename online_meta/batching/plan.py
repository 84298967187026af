"""Execution plans for a sum of meta-gradients over tasks, and what they share: groups of one shape and stacks."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import vmap

from online_meta.batches import count_samples, map_tensors, name_tensors
from online_meta.memory import peak_bytes
from online_meta.types import Batch, Meta, MetaGrad, MetaGradient, Task

StackedSum = Callable[[Meta, Task, Tensor], MetaGrad]
"""(meta, tasks stacked along a new first dimension, weights) -> the weighted sum of their meta-gradients."""

BATCHING_MODES = ("loop", "vmap", "traced", "compiled")
"""One task at a time; all tasks at once under ``vmap``; the vmap sum as a recorded program; that program compiled."""


class ExecutionPlan(NamedTuple):
    """How to compute the sum over tasks of one ``signature``: the ``batching`` mode, and ``tasks`` per batch.

    ``program`` is the digest of the traced or compiled program, empty if there is none. ``pad`` are the sizes that the
    tasks are padded to (see ``padding.py``), of which the signature is then that; empty for tasks as they are. The
    arguments and the plan determine a sum to the bit.
    """

    batching: str
    tasks: int = 1
    signature: str = ""
    program: str = ""
    pad: tuple[int, ...] = ()


LOOP_PLAN = ExecutionPlan("loop")


class Group(NamedTuple):
    """Tasks of one signature and their weights."""

    signature: str
    tasks: list[Task]
    weights: list[float]


def signature_of(task: Task) -> str:
    """Return the shapes and dtypes of a task as readable text; tasks with equal signatures can share a program."""
    return _format_signature(*map(_list_layout, task))


Layout = tuple[tuple[str, torch.Size, torch.dtype], ...]
"""Name, shape and dtype of each tensor of a batch."""


def _list_layout(batch: Batch) -> Layout:
    named = name_tensors("x", batch.x) | name_tensors("y", batch.y)
    if batch.weight is not None:
        named["weight"] = batch.weight
    return tuple((name, part.shape, part.dtype) for name, part in named.items())


@lru_cache(maxsize=1024)
def _format_signature(support: Layout, query: Layout) -> str:
    def one(layout: Layout) -> str:
        return " ".join(f"{name} {str(dtype).removeprefix('torch.')}{[*shape]}" for name, shape, dtype in layout)

    return f"support {one(support)}, query {one(query)}"


def group_tasks(tasks: Sequence[Task], weights: Sequence[float], plans: Mapping[str, ExecutionPlan]) -> Iterator[Group]:
    """Group the tasks by signature, in order of first occurrence; split each group by its plan's batch size."""
    groups: dict[str, Group] = {}
    for task, weight in zip(tasks, weights, strict=True):
        signature = signature_of(task)
        group = groups.setdefault(signature, Group(signature, [], []))
        group.tasks.append(task)
        group.weights.append(weight)
    for signature, together, shares in groups.values():
        plan = plans.get(signature, LOOP_PLAN)
        size = len(together) if plan.batching == "loop" else plan.tasks
        for first in range(0, len(together), size):
            yield Group(signature, together[first : first + size], shares[first : first + size])


def stack(group: Group, tasks: int, like: Tensor) -> tuple[Task, Tensor]:
    """Stack a group's tasks into one of ``tasks`` rows, and their weights; padding repeats the first with weight 0."""
    spare = tasks - len(group.tasks)
    rows = [*group.tasks, *[group.tasks[0]] * spare]
    stacked = map_tensors(lambda *leaves: torch.stack(leaves), *rows)
    return stacked, weights_like(like, [*group.weights, *[0.0] * spare])


def weights_like(like: Tensor, weights: Sequence[float]) -> Tensor:
    """Return weights of tasks on the device of ``like``, in its dtype, or in float32 if that is coarser or complex."""
    return torch.tensor([*weights], dtype=torch.promote_types(like.dtype.to_real(), torch.float32), device=like.device)


def vmapped(gradient: MetaGradient) -> StackedSum:
    """Return the sum over stacked tasks that maps the one-task ``gradient`` with ``torch.func.vmap``."""

    def stacked_sum(meta: Meta, stacked: Task, weights: Tensor) -> MetaGrad:
        each = vmap(gradient, in_dims=(None, 0))(meta, stacked)
        total: MetaGrad = map_tensors(lambda leaf: torch.tensordot(weights.to(leaf.dtype), leaf, 1), each)
        return total

    return stacked_sum


def any_weight(meta: Meta) -> Tensor:
    """Return one of the weights: all have its dtype and device."""
    return next(iter(meta.weights.values()))


def fit_task_count(gradient: MetaGradient, meta: Meta, task: Task, max_tasks: int, memory_limit: int | None) -> int:
    """Return how many tasks like ``task`` fit into ``memory_limit`` bytes of live tensors, at most ``max_tasks``.

    The function measures the peaks for one and two tasks and extrapolates linearly. 0 means that one task does not fit.
    """
    if memory_limit is None:
        return max_tasks
    stacked_sum = vmapped(gradient)

    def peak(count: int) -> int:
        return peak_bytes(
            lambda: stacked_sum(meta, *stack(Group("", [task] * count, [1.0] * count), count, any_weight(meta)))
        )

    one, two = peak(1), peak(2)
    return min(max_tasks, 0 if one > memory_limit else 1 + (memory_limit - one) // max(two - one, 1))


def unstack(stacked: Task) -> list[Task]:
    """Split a stack along its first dimension into tasks."""
    return [unstack_one(stacked, k) for k in range(count_samples(stacked.support))]


def unstack_one(stacked: Task, k: int) -> Task:
    """Return task ``k`` of a stack."""
    return map_tensors(lambda leaf: leaf[k], stacked)


def vary_task(task: Task, k: int) -> Task:
    """Return a variant of ``task`` that differs for each k > 0, so that a program that mixes up tasks is noticed."""

    def vary(batch: Batch) -> Batch:
        x = map_tensors(lambda tensor: tensor.roll(k, 0), batch.x)
        return batch._replace(x=map_tensors(lambda t: t * (1 + k / 64) if t.is_floating_point() else t, x))

    return Task(vary(task.support), vary(task.query)) if k else task
