"""Choose a way to sum meta-gradients by trying each on the tasks at hand: right first, then fast."""

import logging
import shutil
import tempfile
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from online_meta.batching.compile import Compilation, CompileError, Program, Traced, as_stacked_sum, load_program, trace
from online_meta.batching.plan import (
    BATCHING_MODES,
    ExecutionPlan,
    Group,
    StackedSum,
    signature_of,
    stack,
    unstack,
    unstack_one,
    vmapped,
)
from online_meta.batching.task_sum import TaskSum, sum_in_loop
from online_meta.memory import peak_bytes
from online_meta.registry import nearest
from online_meta.tree import scale, to_float64
from online_meta.types import Batch, Meta, MetaGrad, MetaGradient, Task

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
    precision (1e-5 at least): torch's compilers have been silently wrong. ``max_tasks`` tasks go at a time, or
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
    """Return how many tasks like ``task`` fit into ``memory_limit`` bytes of live tensors, at most ``max_tasks``.

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


MEASURE_AFTER_SECONDS = 2.0


MAX_SIGNATURES = 8
"""Tasks of so many shapes are measured; those of further ones go one by one."""


log = logging.getLogger(__name__)


class Autotuner:
    """Measures each signature when it first comes, and compiles in the background what is worth it, one at a time."""

    def __init__(
        self,
        task_sum: TaskSum,
        max_tasks: int,
        *,
        batching: str = "auto",
        memory_limit: int | None = None,
        folder: Path | None = None,
        compiles: bool = True,
        measure_after: float = MEASURE_AFTER_SECONDS,
    ) -> None:
        """Find paths for ``task_sum``, ``max_tasks`` tasks at a time and within ``memory_limit`` bytes.

        With a ``batching`` of ``BATCHING_MODES`` every signature uses that mode. Compiled programs are kept in
        ``folder``; without one nothing is compiled. One that leaves compiling to another process (``compiles`` false)
        takes the programs that appear there. Nothing is measured before ``task_sum`` has run
        ``measure_after`` seconds: a shorter run gains nothing. Raises ``ValueError`` for an unknown ``batching``.
        """
        if batching not in (*BATCHING_MODES, "auto"):
            raise ValueError(f"how = {batching!r}: {nearest(batching, (*BATCHING_MODES, 'auto'))}")
        self._task_sum, self._batching, self._folder, self._compiles = task_sum, batching, folder, compiles
        self._max_tasks, self._memory_limit, self._measure_after = max_tasks, memory_limit, measure_after
        self._best: dict[str, Measurement] = {}
        self._queue: deque[PlanChoice] = deque()
        self._compiling: tuple[PlanChoice, Compilation] | None = None

    def find(self, meta: Meta, tasks: Sequence[Task]) -> tuple[ExecutionPlan, ...]:
        """Return the best paths known by now for tasks like these and all before them."""
        if self._batching == "auto" and self._task_sum.seconds < self._measure_after:
            return ()
        for signature, task in {signature_of(task): task for task in reversed(tasks)}.items():
            if signature not in self._best and len(self._best) < MAX_SIGNATURES:
                similar = [one for one in tasks if signature_of(one) == signature] or [task]
                self._measure_signature(
                    meta, [_perturb(similar[k % len(similar)], k // len(similar)) for k in range(self._max_tasks)]
                )
        self._poll()
        return tuple(best.plan for best in self._best.values())

    def has_plan_for(self, task: Task) -> bool:
        """Return whether tasks like this have been met."""
        return signature_of(task) in self._best

    def wait(self) -> None:
        """Wait for all that is being compiled."""
        while self._compiling or self._queue:
            if self._compiling is not None:
                self._compiling[1].wait()
            self._poll()

    def close(self) -> None:
        """Stop what is being compiled."""
        self._queue.clear()
        if self._compiling is not None:
            self._compiling[1].close()
            self._compiling = None

    def _measure_signature(self, meta: Meta, tasks: list[Task]) -> None:
        if self._batching != "auto":
            size = fit_task_count(self._task_sum.gradient, meta, tasks[0], self._max_tasks, self._memory_limit)
            plan = ExecutionPlan(self._batching, max(size, 1), signature_of(tasks[0]))
            self._best[plan.signature] = Measurement(plan, 0.0, 0.0, None)
            return
        choice = choose_plan(self._task_sum.gradient, meta, tasks, self._max_tasks, self._memory_limit)
        best = next(measurement for measurement in choice.measured if measurement.plan == choice.plan)
        self._best[choice.benchmark.group.signature] = best
        timings = ", ".join(f"{measurement.plan.batching} {_describe(measurement)}" for measurement in choice.measured)
        log.info("%d tasks of %s: %s", len(choice.benchmark.group.tasks), choice.benchmark.group.signature, timings)
        if choice.traced is not None and self._folder is not None:
            self._queue.append(choice)

    def _poll(self) -> None:
        if self._compiling is not None:
            choice, compilation = self._compiling
            try:
                program = compilation.poll()
            except CompileError as error:
                log.warning("%s; %s goes on", error, choice.plan.batching)
                self._compiling, program = None, None
            if program is not None:
                self._compiling = None
                self._adopt_program(choice, program)
        if self._compiling is None:
            self._start_next()

    def _start_next(self) -> None:
        if not self._queue or self._folder is None:
            return
        choice = self._queue[0]
        assert choice.traced is not None
        program = load_program(self._folder, choice.traced.digest)
        if program is not None:
            self._queue.popleft()
            self._adopt_program(choice, program)
        elif self._compiles:
            self._queue.popleft()
            self._compiling = choice, Compilation(choice.traced, self._folder)

    def _adopt_program(self, choice: PlanChoice, program: Program) -> None:
        """Let a compiled program take over, if it is right and faster than what there is."""
        assert choice.traced is not None
        signature = choice.benchmark.group.signature
        plan = ExecutionPlan("compiled", choice.plan.tasks, signature, choice.traced.digest)
        found = benchmark_plan(choice.benchmark, plan, as_stacked_sum(program))
        log.info(
            "compiled: %s, instead of %s %s", _describe(found), choice.plan.batching, _describe(self._best[signature])
        )
        if found.rejection is None and found.seconds < self._best[signature].seconds:
            self._task_sum.add_program(plan, program)
            self._best[signature] = found


def _perturb(task: Task, k: int) -> Task:
    """Return a task that differs from ``task`` for k > 0: among equal ones, an error in telling them apart hides."""

    def vary(batch: Batch) -> Batch:
        x = batch.x.roll(k, 0)
        return Batch(x * (1 + k / 64) if x.is_floating_point() else x, batch.y)

    return Task(vary(task.support), vary(task.query)) if k else task


def _describe(measurement: Measurement) -> str:
    return f"is out: {measurement.rejection}" if measurement.rejection else f"{measurement.seconds * 1e3:.2f} ms"


def over_tasks(
    gradient: MetaGradient, batching: str = "auto", *, folder: Path | None = None, memory_limit: int | None = None
) -> Callable[[Meta, Sequence[Task] | Task], MetaGrad]:
    """Return (meta, tasks) -> the mean loss and meta-gradient over one task or more.

    ``tasks`` is a list, in which shapes may differ, or one ``Task`` whose tensors are stacks of tasks, (tasks, n, ...).
    ``batching`` is the mode: "loop", task by task; "vmap", those of one shape at once; "traced", the same as a
    recorded program; "compiled", that program compiled, which takes seconds to minutes; "auto": each is tried on the
    first tasks of a shape, the fastest that agrees with the loop goes on, and a compiled program takes over once it is
    there. The ways differ in rounding: where the same bits matter, name one. Compiled programs are kept in ``folder``,
    where nobody else may write (None: one that is removed in the end). Stacked tasks are cut so that live tensors
    stay under ``memory_limit`` bytes.
    Raises ``ValueError`` for an unknown ``batching``; the function returned does for an empty list.
    """
    if batching not in (*BATCHING_MODES, "auto"):
        raise ValueError(f"how = {batching!r}: {nearest(batching, (*BATCHING_MODES, 'auto'))}")
    own = folder is None and batching in ("auto", "compiled")
    place = Path(tempfile.mkdtemp(prefix="online-meta-")) if own else folder
    task_sum = TaskSum(gradient, place)
    find = partial(Autotuner, task_sum, batching=batching, memory_limit=memory_limit, folder=place)
    tuner: Autotuner | None = None

    def mean(meta: Meta, tasks: Sequence[Task] | Task) -> MetaGrad:
        nonlocal tuner
        count = len(tasks.support.x) if isinstance(tasks, Task) else len(tasks)
        if not count:
            raise ValueError("a meta-gradient over no tasks is not defined: give one task or more")
        tuner = tuner or find(count)
        if not isinstance(tasks, Task):
            task_sum.follow(tuner.find(meta, tasks))
            return scale(task_sum(meta, tasks, [1.0] * count), 1.0 / count)
        first = unstack_one(tasks, 0)
        task_sum.follow(tuner.find(meta, [first] if tuner.has_plan_for(first) else unstack(tasks)))
        return task_sum.sum_stacked(meta, tasks, next(iter(meta.weights.values())).new_full((count,), 1.0 / count))

    if own and place is not None:
        weakref.finalize(mean, shutil.rmtree, place, ignore_errors=True)
    return mean
