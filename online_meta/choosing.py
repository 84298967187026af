"""Choose a way to sum meta-gradients by trying each on the tasks at hand: right first, then fast."""

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from online_meta.memory import peak_bytes
from online_meta.paths import ExecutionPlan, Group, StackedSum, signature_of, stack, vmapped
from online_meta.summing import sum_in_loop
from online_meta.tracing import Traced, as_stacked_sum, trace
from online_meta.tree import to_float64
from online_meta.types import Meta, MetaGrad, MetaGradient, Task

MAX_OPERATIONS = 10_000
"""Programs above this size take minutes to compile, and large models gain nothing by it."""
SLOW_SECONDS = 0.5
"""A task that takes longer is one of a model large enough for its operations, not their number, to take the time."""
MEASURE_SECONDS = 1.0
TOLERANCE = 1e-5


class Measurement(NamedTuple):
    """How a way did: seconds and error a task-sum of ``plan.tasks``, and why it is out of the question, if it is."""

    plan: ExecutionPlan
    seconds: float
    error: float
    rejection: str | None


class Benchmark(NamedTuple):
    """What candidates are tried on: tasks of one signature, what is right, and how far off the loop may be."""

    gradient: MetaGradient
    meta: Meta
    group: Group
    reference: MetaGrad
    tolerance: float
    loop: Measurement


class PlanChoice(NamedTuple):
    """The best path for a signature, what was measured, and the program that is worth compiling, if there is one."""

    plan: ExecutionPlan
    measured: tuple[Measurement, ...]
    benchmark: Benchmark
    traced: Traced | None


def choose_plan(
    gradient: MetaGradient, meta: Meta, tasks: Sequence[Task], max_tasks: int, memory_limit: int | None
) -> PlanChoice:
    """Measure loop, vmap and traced on ``tasks``, which are of one signature; return the fastest that is right.

    A way is right when its error against the loop in float64 is at most ten times the loop's own in the tasks'
    precision (1e-5 at least): the compilers of torch have been wrong without a word. ``max_tasks`` tasks go at a time, or
    as many as keep the peak under ``memory_limit`` bytes. Models that take long over one task are left to the loop.
    """
    benchmark = _benchmark_loop(gradient, meta, tasks, max_tasks)
    stacked_sum = vmapped(gradient)
    plan = ExecutionPlan("vmap", max_tasks, benchmark.group.signature)
    try:
        size = (
            fit_task_count(gradient, meta, tasks[0], max_tasks, memory_limit) if len(benchmark.group.tasks) > 1 else 0
        )
        if size < 1:
            return PlanChoice(benchmark.loop.plan, (benchmark.loop,), benchmark, None)
        if size < len(benchmark.group.tasks):  # What does not fit is not tried either.
            benchmark = _benchmark_loop(gradient, meta, tasks, size)
        plan = plan._replace(tasks=size)
        operations = count_operations(lambda: stacked_sum(meta, *_stack_rows(benchmark, len(benchmark.group.tasks))))
    except Exception as error:  # Whatever a user's model raises under vmap: it is then learned task by task.
        failed = Measurement(plan, float("inf"), float("inf"), f"{type(error).__name__}: {str(error).splitlines()[0]}")
        return PlanChoice(benchmark.loop.plan, (benchmark.loop, failed), benchmark, None)
    measured = [benchmark.loop, benchmark_plan(benchmark, plan, stacked_sum)]
    traced = None
    if operations <= MAX_OPERATIONS:
        traced = trace(stacked_sum, meta, *_stack_rows(benchmark, size))
        plan = ExecutionPlan("traced", size, benchmark.group.signature, traced.digest)
        measured.append(benchmark_plan(benchmark, plan, as_stacked_sum(traced.graph)))
    best = fastest(measured)
    return PlanChoice(best.plan, tuple(measured), benchmark, traced if best.plan.batching != "loop" else None)


def benchmark_plan(benchmark: Benchmark, plan: ExecutionPlan, stacked_sum: StackedSum) -> Measurement:
    """Run a way on the trial's tasks; return its time, its error, and whether that refuses it."""
    rows = len(benchmark.group.tasks) if plan.batching == "vmap" else plan.tasks
    given = _stack_rows(benchmark, rows)
    error = relative_error(stacked_sum(benchmark.meta, *given), benchmark.reference)
    if not error <= benchmark.tolerance:
        return Measurement(
            plan, float("inf"), error, f"its error is {error:.1e}, and {benchmark.tolerance:.1e} is allowed"
        )
    share = len(benchmark.group.tasks) / rows
    return Measurement(plan, _median_seconds(lambda: stacked_sum(benchmark.meta, *given)) * share, error, None)


def fastest(measured: Sequence[Measurement]) -> Measurement:
    """Return the fastest that is not refused; the first is the loop, which never is."""
    return min(
        (measurement for measurement in measured if measurement.rejection is None),
        key=lambda measurement: measurement.seconds,
    )


def fit_task_count(gradient: MetaGradient, meta: Meta, task: Task, max_tasks: int, memory_limit: int | None) -> int:
    """Return how many tasks like ``task`` keep the peak of live tensors under ``memory_limit`` bytes, ``max_tasks`` at most.

    The peaks of one task and of two tell what each further task takes; 0 says that not even one fits.
    """
    if memory_limit is None:
        return max_tasks
    stacked_sum = vmapped(gradient)

    def peak(count: int) -> int:
        return peak_bytes(
            lambda: stacked_sum(meta, *stack(Group("", [task] * count, [1.0] * count), count, _any_weight(meta)))
        )

    one, two = peak(1), peak(2)
    return min(max_tasks, 0 if one > memory_limit else 1 + (memory_limit - one) // max(two - one, 1))


def relative_error(found: MetaGrad, reference: MetaGrad) -> float:
    """Return ||found - right|| / ||right|| over the loss and all gradients."""
    pairs = list(zip(tree_leaves(found), tree_leaves(reference), strict=True))
    far = sum(float((a.double() - b.double()).square().sum()) for a, b in pairs)
    return float((far / max(sum(float(b.double().square().sum()) for _, b in pairs), 1e-300)) ** 0.5)


def count_operations(work: Callable[[], Any]) -> int:
    """Run ``work``; return how many tensor operations it made."""
    counter = _Counter()
    with counter:
        work()
    return counter.count


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def _benchmark_loop(gradient: MetaGradient, meta: Meta, tasks: Sequence[Task], max_tasks: int) -> Benchmark:
    """Time the loop, and find out what is right; of slow models on fewer tasks."""
    one = Group(signature_of(tasks[0]), [tasks[0]], [1.0])
    gradient(meta, tasks[0])  # The first call of all is slower than any other.
    began = time.perf_counter()
    found = sum_in_loop(gradient, meta, one)
    taken = max(time.perf_counter() - began, 1e-9)
    if taken > SLOW_SECONDS:
        return Benchmark(
            gradient, meta, one, found, 0.0, Measurement(ExecutionPlan("loop", 1, one.signature), taken, 0.0, None)
        )
    count = min(len(tasks), max_tasks, max(2, int(MEASURE_SECONDS / taken)))
    group = Group(one.signature, list(tasks[:count]), [1.0] * count)
    found = sum_in_loop(gradient, meta, group)
    try:
        reference = sum_in_loop(gradient, *to_float64((meta, group)))
        tolerance = max(TOLERANCE, 10 * relative_error(found, reference))
    except Exception:  # A model that names its precision cannot be run in another: the loop itself is then right.
        reference, tolerance = found, 10 * TOLERANCE
    seconds = _median_seconds(lambda: sum_in_loop(gradient, meta, group))
    plan = ExecutionPlan("loop", 1, group.signature)
    return Benchmark(
        gradient, meta, group, reference, tolerance, Measurement(plan, seconds, relative_error(found, reference), None)
    )


def _stack_rows(benchmark: Benchmark, rows: int) -> tuple[Task, Tensor]:
    group = Group(benchmark.group.signature, benchmark.group.tasks[:rows], benchmark.group.weights[:rows])
    return stack(group, rows, _any_weight(benchmark.meta))


def _any_weight(meta: Meta) -> Tensor:
    return next(iter(meta.weights.values()))


def _median_seconds(work: Callable[[], Any]) -> float:
    taken: list[float] = []
    while len(taken) < 5 and (len(taken) < 1 or sum(taken) < MEASURE_SECONDS):
        began = time.perf_counter()
        work()
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - began)
    return sorted(taken)[len(taken) // 2]
