"""Find the best path for the tasks that come, and a better one while the work goes on."""

import logging
from collections import deque
from collections.abc import Sequence
from pathlib import Path

from online_meta.choosing import Measurement, PlanChoice, benchmark_plan, choose_plan, fit_task_count
from online_meta.compiling import Compilation, CompileError, load_program
from online_meta.paths import BATCHING_MODES, ExecutionPlan, signature_of
from online_meta.registry import nearest
from online_meta.summing import TaskSum
from online_meta.tracing import Program, as_stacked_sum
from online_meta.types import Batch, Meta, Task

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

        A ``batching`` of ``BATCHING_MODES`` leaves nothing to find: every signature goes by it. Compiled programs are kept in
        ``folder``; without one nothing is compiled. One that leaves compiling to another process (``compiles`` false)
        takes the programs that appear there. Nothing is measured before ``task_sum`` has taken ``measure_after`` seconds in
        all: what is over sooner is not worth it. Raises ``ValueError`` for an unknown ``batching``.
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
