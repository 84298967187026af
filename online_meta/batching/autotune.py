"""Choose how to sum meta-gradients: benchmark each batching mode on the current tasks, keep the fastest correct one."""

import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from online_meta.batching.compile import (
    STOP_CHECK_SECONDS,
    Compilation,
    CompileError,
    Traced,
    always_continue,
    as_stacked_sum,
    trace,
)
from online_meta.batching.padding import (
    PadTask,
    Sizes,
    as_it_is,
    choose_sizes,
    cost,
    covers,
    explain_inexact,
    measure,
    pad_task,
    relative_error,
)
from online_meta.batching.plan import (
    BATCHING_MODES,
    ExecutionPlan,
    Group,
    StackedSum,
    any_weight,
    fit_task_count,
    signature_of,
    stack,
    vary_task,
    vmapped,
)
from online_meta.batching.programs import (
    CompilerBusy,
    Program,
    Programs,
    find_refusal,
    load_program,
    refuse_program,
)
from online_meta.batching.task_sum import TaskSum, sum_in_loop
from online_meta.memory import count_operations
from online_meta.registry import nearest
from online_meta.tree import to_float64
from online_meta.types import Meta, MetaGrad, MetaGradient, Task

MAX_OPERATIONS = 10_000
"""Programs with more operations take minutes to compile, and large models do not become faster by it."""

SLOW_SECONDS = 0.5
"""If one task takes longer than this, the time is spent inside the operations, so batching tasks cannot save any."""

MEASURE_SECONDS = 1.0
"""Upper bound on the time of one benchmark run of the loop; it limits how many tasks are benchmarked."""

REPEAT_SECONDS = 0.1
"""A benchmark is repeated, at most five times, until it has taken this long."""

DISTINCT_TASKS = 8
"""The number of different tasks in a benchmark: the loop computes each once, however many rows are stacked."""


TOLERANCE = 1e-5
"""Smallest relative error against the float64 reference that a candidate may have."""


class Measurement(NamedTuple):
    """The result of one benchmark: seconds per sum, relative error, and the reason for rejection (None if accepted)."""

    plan: ExecutionPlan
    seconds: float
    error: float
    rejection: str | None


class Benchmark(NamedTuple):
    """The input of a benchmark: tasks of one signature, the reference sum, the allowed error, the loop's result."""

    gradient: MetaGradient
    meta: Meta
    group: Group
    reference: MetaGrad
    tolerance: float
    loop: Measurement
    pad: PadTask


class PlanChoice(NamedTuple):
    """The best plan for a signature, all measurements, and the program to compile next (None if there is none)."""

    plan: ExecutionPlan
    measured: tuple[Measurement, ...]
    benchmark: Benchmark
    traced: Traced | None


def choose_plan(
    gradient: MetaGradient,
    meta: Meta,
    tasks: Sequence[Task],
    max_tasks: int,
    memory_limit: int | None,
    should_continue: Callable[[], bool] = always_continue,
    pad: PadTask = as_it_is,
) -> PlanChoice:
    """Benchmark loop, vmap and traced on ``tasks`` of one signature; return the fastest plan with correct results.

    The reference is the loop in float64. A result is correct if its relative error is at most ten times the error of
    the loop in the tasks' own precision, or 1e-5 if that is larger: torch's compilers have given wrong results without
    an error. A batch has at most ``max_tasks`` tasks, fewer if the peak of live tensors would exceed ``memory_limit``
    bytes; it is filled with ``DISTINCT_TASKS`` of the ``tasks`` in turn. Models that need more than ``SLOW_SECONDS``
    for one task use the loop. All but the loop compute with padded tasks, ``pad(task)``, whose signature is that of the
    plan.

    Raises ``CompileStopped`` as soon as ``should_continue`` returns False while a program is recorded.
    """
    benchmark = _benchmark_loop(gradient, meta, tasks, max_tasks, pad)
    stacked_sum = vmapped(gradient)
    plan = ExecutionPlan("vmap", max_tasks, benchmark.group.signature)
    try:
        may_stack = benchmark.tolerance > 0 and (len(benchmark.group.tasks) > 1 or max_tasks == 1)
        size = fit_task_count(gradient, meta, pad(tasks[0]), max_tasks, memory_limit) if may_stack else 0
        if size < 1:
            return PlanChoice(benchmark.loop.plan, (benchmark.loop,), benchmark, None)
        if size < len(benchmark.group.tasks):  # Benchmark no more tasks than fit into memory.
            benchmark = _benchmark_loop(gradient, meta, tasks, size, pad)
        plan = plan._replace(tasks=size)
        operations = count_operations(lambda: stacked_sum(meta, *_stack_rows(benchmark, len(benchmark.group.tasks))))
    except Exception as error:  # A user's model may raise anything under vmap; it then uses the loop.
        failed = Measurement(plan, float("inf"), float("inf"), f"{type(error).__name__}: {str(error).splitlines()[0]}")
        return PlanChoice(benchmark.loop.plan, (benchmark.loop, failed), benchmark, None)
    measured = [benchmark.loop, benchmark_plan(benchmark, plan, stacked_sum)]
    traced = None
    if operations <= MAX_OPERATIONS:
        traced = trace(stacked_sum, meta, *_stack_rows(benchmark, size), should_continue)
        plan = ExecutionPlan("traced", size, benchmark.group.signature, traced.digest)
        measured.append(benchmark_plan(benchmark, plan, as_stacked_sum(traced.graph)))
    best = fastest(measured)
    # An engine writes to its meta-parameters while the program is compiled: the reference is that of the present ones.
    benchmark = benchmark._replace(meta=Meta(*({name: value.clone() for name, value in part.items()} for part in meta)))
    return PlanChoice(best.plan, tuple(measured), benchmark, traced if best.plan.batching != "loop" else None)


def benchmark_plan(benchmark: Benchmark, plan: ExecutionPlan, stacked_sum: StackedSum) -> Measurement:
    """Run a plan on the benchmark's tasks; return its time and error, and reject it if the error is too large."""
    rows = len(benchmark.group.tasks) if plan.batching == "vmap" else plan.tasks
    given = _stack_rows(benchmark, rows)
    error = relative_error(stacked_sum(benchmark.meta, *given), benchmark.reference)
    if not error <= benchmark.tolerance:
        return Measurement(
            plan, float("inf"), error, f"its error is {error:.1e}, above the limit of {benchmark.tolerance:.1e}"
        )
    share = len(benchmark.group.tasks) / rows
    return Measurement(plan, _median_seconds(lambda: stacked_sum(benchmark.meta, *given)) * share, error, None)


def fastest(measured: Sequence[Measurement]) -> Measurement:
    """Return the fastest accepted measurement; the first one is the loop, which is always accepted."""
    return min(
        (measurement for measurement in measured if measurement.rejection is None),
        key=lambda measurement: measurement.seconds,
    )


def _benchmark_loop(
    gradient: MetaGradient, meta: Meta, tasks: Sequence[Task], max_tasks: int, pad: PadTask
) -> Benchmark:
    """Time the loop and compute the float64 reference; slow models are measured on one task, without a reference."""
    one = Group(signature_of(pad(tasks[0])), [tasks[0]], [1.0])
    gradient(meta, tasks[0])  # Warm up: the first call is slower than all others.
    began = time.perf_counter()
    found = sum_in_loop(gradient, meta, one)
    taken = max(time.perf_counter() - began, 1e-9)
    if taken > SLOW_SECONDS:
        return Benchmark(
            gradient,
            meta,
            one,
            found,
            0.0,
            Measurement(ExecutionPlan("loop", 1, one.signature), taken, 0.0, None),
            pad,
        )
    count = min(len(tasks), max_tasks, max(2, int(MEASURE_SECONDS / taken)))
    few = min(count, DISTINCT_TASKS)
    group = Group(one.signature, [tasks[k % few] for k in range(count)], [1.0] * count)
    once = Group(one.signature, list(tasks[:few]), [float(len(range(k, count, few))) for k in range(few)])
    found = sum_in_loop(gradient, meta, once)
    try:
        reference = sum_in_loop(gradient, *to_float64((meta, once)))
        tolerance = max(TOLERANCE, 10 * relative_error(found, reference))
    except Exception:  # A model with a hard-coded dtype cannot run in float64; the loop's own result is the reference.
        reference, tolerance = found, 10 * TOLERANCE
    seconds = _median_seconds(lambda: sum_in_loop(gradient, meta, once)) * count / few
    plan = ExecutionPlan("loop", 1, group.signature)
    return Benchmark(
        gradient,
        meta,
        group,
        reference,
        tolerance,
        Measurement(plan, seconds, relative_error(found, reference), None),
        pad,
    )


def _stack_rows(benchmark: Benchmark, rows: int) -> tuple[Task, Tensor]:
    tasks = [benchmark.pad(task) for task in benchmark.group.tasks[:rows]]
    group = Group(benchmark.group.signature, tasks, benchmark.group.weights[:rows])
    return stack(group, rows, any_weight(benchmark.meta))


def _median_seconds(work: Callable[[], Any]) -> float:
    taken: list[float] = []
    while len(taken) < 5 and (len(taken) < 1 or sum(taken) < REPEAT_SECONDS):
        began = time.perf_counter()
        work()
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - began)
    return sorted(taken)[len(taken) // 2]


MEASURE_AFTER_SECONDS = 2.0
"""The time that the loop must have taken before anything is measured, so that short runs do not pay for it."""

MEASURE_AFTER_TASKS = 64
"""The number of tasks after which it is measured earlier: recording a program and comparing it with the loop takes as
long as the loop takes for some 60 to 90 tasks, because both are the time of single operations. A number of tasks does
not depend on how quick the machine is, so that the same run begins to measure at the same round."""

COMPILE_AFTER = 3
"""The number of times that a shape must have come before a program for it is compiled."""

MAX_SIGNATURES = 8
"""The number of signatures that are benchmarked; tasks of any further signature use the loop."""

EXACT_SIGNATURES = 2
"""The number of signatures that have plans of their own before tasks of others are padded."""


log = logging.getLogger(__name__)


class Autotuner:
    """Benchmarks each signature when it first occurs and compiles programs in the background, one at a time."""

    def __init__(
        self,
        task_sum: TaskSum,
        max_tasks: int,
        *,
        batching: str = "auto",
        memory_limit: int | None = None,
        folder: Path | Programs | None = None,
        compiles: bool = True,
        measure_after: float = MEASURE_AFTER_SECONDS,
        pad_sizes: Sequence[int] | None = None,
    ) -> None:
        """Prepare to find plans for ``task_sum``.

        Args:
            task_sum: sums the gradients; its ``seconds`` decide when measuring starts.
            max_tasks: the largest number of tasks in a batch, at least 1.
            batching: "auto" to benchmark, or one of ``BATCHING_MODES`` for all signatures.
            memory_limit: limit on the live tensors of a batch, in bytes; None for no limit.
            folder: where compiled programs are stored, and the cache that they are shared by; None to compile nothing.
            compiles: whether this process compiles; if false, it loads the programs that another one puts there.
            measure_after: seconds that ``task_sum`` must have run before anything is measured. Where the loop is quick,
                ``MEASURE_AFTER_TASKS`` tasks are enough; another number of seconds changes theirs in proportion.
            pad_sizes: the sizes that sets, and sequences with a mask, are padded to; none to pad nothing. None to give
                the first two signatures plans of their own, and to pad tasks of others to at most 4 further sizes.

        Raises:
            ValueError: if ``batching`` is unknown.
        """
        if batching not in (*BATCHING_MODES, "auto"):
            raise ValueError(f"batching = {batching!r}: {nearest(batching, (*BATCHING_MODES, 'auto'))}")
        self._task_sum, self._batching, self._folder, self._compiles = task_sum, batching, folder, compiles
        self._max_tasks, self._memory_limit, self._measure_after = max_tasks, memory_limit, measure_after
        self._pad_sizes, self._may_pad = pad_sizes, pad_sizes is None or len(pad_sizes) > 0
        self._best: dict[str, Measurement] = {}
        self._known: dict[str, ExecutionPlan] = {}
        self._seen: dict[Sizes, None] = {}
        self._waiting: dict[str, PlanChoice] = {}
        self._sightings: Counter[str] = Counter()
        self._queue: deque[PlanChoice] = deque()
        self._compiling: tuple[PlanChoice, Compilation] | None = None
        self._try_again_at = 0.0

    def find(
        self,
        meta: Meta,
        tasks: Sequence[Task],
        known: Iterable[ExecutionPlan] = (),
        summed: int | None = None,
    ) -> tuple[ExecutionPlan, ...]:
        """Return the best plans so far, one for each signature; benchmark the signatures in ``tasks`` if new.

        Args:
            meta: the meta-parameters.
            tasks: tasks that have come since the last call.
            known: plans that are followed already, such as those of an earlier start.
            summed: the tasks whose gradients have been summed; None for those of ``task_sum`` in this process.
        """
        if self._batching == "auto" and not self._is_worth_measuring(summed):
            return ()
        self._known = {plan.signature: plan for plan in known}
        for signature, task in {signature_of(task): task for task in reversed(tasks)}.items():
            if signature not in self._best:
                similar = [one for one in tasks if signature_of(one) == signature] or [task]
                self._find_plan(
                    meta, [vary_task(similar[k % len(similar)], k // len(similar)) for k in range(self._max_tasks)]
                )
        self._queue_due(tasks)
        self._poll()
        return tuple(best.plan for best in self._best.values())

    def _is_worth_measuring(self, summed: int | None) -> bool:
        count = self._task_sum.count if summed is None else summed
        enough = MEASURE_AFTER_TASKS * self._measure_after / MEASURE_AFTER_SECONDS
        return self._task_sum.seconds >= self._measure_after or count >= enough

    def _queue_due(self, tasks: Sequence[Task]) -> None:
        """Queue the programs that are worth compiling: shapes that recur, in a run that is not short."""
        if not self._waiting:
            return
        for task in tasks:
            signature = signature_of(task)
            self._sightings[signature if signature in self._best else signature_of(self._task_sum.fit(task))] += 1
        if self._task_sum.seconds >= self._measure_after:
            for signature in [one for one in self._waiting if self._sightings[one] >= COMPILE_AFTER]:
                self._queue.append(self._waiting.pop(signature))

    def has_plan_for(self, task: Task) -> bool:
        """Return whether the signature of ``task`` has a plan of its own."""
        return signature_of(task) in self._best

    def is_compiling(self) -> bool:
        """Return whether a program is being compiled or waits for its turn."""
        return self._compiling is not None or bool(self._queue and self._folder is not None and self._compiles)

    def wait(self) -> None:
        """Wait until all queued programs are compiled; those that are not worth compiling yet are not waited for."""
        while self._compiling or (self._queue and self._compiles):
            if self._compiling is not None:
                self._compiling[1].wait()
            elif self._try_again_at:
                time.sleep(STOP_CHECK_SECONDS)
            self._poll()

    def close(self) -> None:
        """Stop the running compilation and clear the queue."""
        self._queue.clear()
        self._waiting.clear()
        if self._compiling is not None:
            self._compiling[1].close()
            self._compiling = None

    def _find_plan(self, meta: Meta, tasks: list[Task]) -> None:
        """Find a plan for tasks of a new signature, maybe one for padded tasks."""
        plans = {**self._known, **{signature: best.plan for signature, best in self._best.items()}}
        sizes = self._choose_sizes(tasks[0], plans)
        if sizes is None:
            return
        padded = pad_task(tasks[0], sizes, self._task_sum.masks) if sizes else tasks[0]
        signature = signature_of(padded)
        if signature in self._best or (signature not in plans and len(plans) >= MAX_SIGNATURES):
            return
        reason = explain_inexact(self._task_sum.gradient, meta, tasks[0], padded) if sizes else None
        if reason is None:
            self._measure_signature(meta, tasks, sizes)
        else:
            log.warning("tasks of other sizes are not padded, but computed one by one: %s", reason)
            self._may_pad = False
            self._find_plan(meta, tasks)

    def _choose_sizes(self, task: Task, plans: Mapping[str, ExecutionPlan]) -> Sizes | None:
        """Return what a task is padded to, () for nothing; None if there is to be no plan for it."""
        sizes = measure(task, self._task_sum.masks)
        seen, self._seen = [*self._seen], {**self._seen, sizes: None}
        known = sorted((plan.pad for plan in plans.values() if plan.pad), key=cost)
        if self._batching == "loop":  # In place of what an earlier start did with tasks of these sizes.
            return next((pad for pad in known if covers(pad, sizes)), ())
        if not self._may_pad or signature_of(task) in plans or 0 in sizes[:2]:
            return ()
        if self._pad_sizes is None and len(plans) - len(known) < EXACT_SIGNATURES:
            return ()
        alike = [one for one in seen if len(one) == len(sizes)]
        return choose_sizes(sizes, alike, known, self._pad_sizes)

    def _measure_signature(self, meta: Meta, tasks: list[Task], sizes: Sizes) -> None:
        task_sum = self._task_sum
        pad = partial(pad_task, sizes=sizes, masks=task_sum.masks) if sizes else as_it_is
        if self._batching != "auto":
            size = fit_task_count(task_sum.gradient, meta, pad(tasks[0]), self._max_tasks, self._memory_limit)
            plan = ExecutionPlan(self._batching, max(size, 1), signature_of(pad(tasks[0])), pad=sizes)
            self._best[plan.signature] = Measurement(plan, 0.0, 0.0, None)
            return
        choice = choose_plan(
            task_sum.gradient, meta, tasks, self._max_tasks, self._memory_limit, task_sum.should_continue, pad
        )
        best = next(measurement for measurement in choice.measured if measurement.plan == choice.plan)
        self._best[choice.benchmark.group.signature] = best._replace(plan=best.plan._replace(pad=sizes))
        timings = ", ".join(f"{measurement.plan.batching} {_describe(measurement)}" for measurement in choice.measured)
        log.info("%d tasks of %s: %s", len(choice.benchmark.group.tasks), choice.benchmark.group.signature, timings)
        if choice.traced is not None and self._folder is not None:
            found = self._use_known(choice, choice.traced, self._folder)
            if not found:
                self._waiting[choice.benchmark.group.signature] = choice

    def _poll(self) -> None:
        if self._compiling is not None:
            choice, compilation = self._compiling
            try:
                program = compilation.poll()
            except CompileError as error:
                self._give_up(choice, str(error), lasting=error.is_lasting)
                self._compiling, program = None, None
            if program is not None:
                self._compiling = None
                self._adopt_program(choice, program)
        if self._compiling is None:
            self._start_next()

    def _give_up(self, choice: PlanChoice, reason: str, *, lasting: bool) -> None:
        """Keep the present plan, and remember the reason if the compiler would fail again."""
        log.warning("%s; keeping batching mode %s", reason, choice.plan.batching)
        if lasting and self._task_sum.should_continue() and self._folder is not None and choice.traced is not None:
            refuse_program(self._folder, choice.traced.digest, reason, failed=True)

    def _start_next(self) -> None:
        """Load the next program in the queue, or start to compile it unless another process is compiling."""
        if not self._queue or self._folder is None or time.monotonic() < self._try_again_at:
            return
        choice, self._try_again_at = self._queue[0], 0.0
        assert choice.traced is not None
        if self._use_known(choice, choice.traced, self._folder):
            self._queue.popleft()
        elif self._compiles and self._task_sum.should_continue():
            self._compile(choice, choice.traced, self._folder)
        else:
            self._try_again_at = time.monotonic() + STOP_CHECK_SECONDS

    def _use_known(self, choice: PlanChoice, traced: Traced, folder: Path | Programs) -> bool:
        """Use a program that was compiled before; return whether there is one, or it is known to be of no use."""
        if refusal := find_refusal(folder, traced.digest):
            log.info("its program is not compiled: %s; keeping batching mode %s", refusal, choice.plan.batching)
            return True
        program = load_program(folder, traced.digest)
        if program is not None:
            self._adopt_program(choice, program)
        return program is not None

    def _compile(self, choice: PlanChoice, traced: Traced, folder: Path | Programs) -> None:
        try:
            self._compiling = choice, Compilation(traced, folder, self._task_sum.should_continue)
        except CompilerBusy:
            self._try_again_at = time.monotonic() + STOP_CHECK_SECONDS
            return
        except CompileError as error:
            self._give_up(choice, str(error), lasting=False)
        self._queue.popleft()

    def _adopt_program(self, choice: PlanChoice, program: Program) -> None:
        """Use a compiled program if its result is correct and it is faster than the current plan."""
        assert choice.traced is not None
        assert self._folder is not None
        signature = choice.benchmark.group.signature
        before, pad = self._best[signature], self._best[signature].plan.pad
        plan = ExecutionPlan("compiled", choice.plan.tasks, signature, choice.traced.digest, pad)
        found = benchmark_plan(choice.benchmark, plan, as_stacked_sum(program))
        log.info("compiled: %s; before, %s: %s", _describe(found), choice.plan.batching, _describe(before))
        if found.rejection is None and found.seconds < before.seconds:
            self._task_sum.add_program(plan, program)
            self._best[signature] = found
            return
        reason = found.rejection or f"it took {_describe(found)} where {before.plan.batching} took {_describe(before)}"
        refuse_program(self._folder, choice.traced.digest, reason)


def _describe(measurement: Measurement) -> str:
    return f"rejected: {measurement.rejection}" if measurement.rejection else f"{measurement.seconds * 1e3:.2f} ms"
