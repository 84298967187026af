"""Sum meta-gradients over tasks, using the selected execution plan for each task shape."""

import logging
import math
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from online_meta.batching.compile import always_continue, as_stacked_sum, compile_now, trace
from online_meta.batching.padding import Masks, cost, covers, measure, pad_task
from online_meta.batching.plan import (
    LOOP_PLAN,
    ExecutionPlan,
    Group,
    StackedSum,
    group_tasks,
    signature_of,
    stack,
    unstack,
    unstack_one,
    vmapped,
    weights_like,
)
from online_meta.batching.programs import Program, Programs, load_program
from online_meta.functional.autodiff import outside_inference_mode
from online_meta.functional.recording import flatten
from online_meta.meta_optimizer import order_like
from online_meta.replay import ReplaySample
from online_meta.replay._task_draw import ALL_SAMPLES, TaskDraw
from online_meta.replay._task_stacks import StackedTasks
from online_meta.tree import add, scale, zeros
from online_meta.types import Meta, MetaGrad, MetaGradient, Task

log = logging.getLogger(__name__)


def sum_in_loop(gradient: MetaGradient, meta: Meta, group: Group) -> MetaGrad:
    """Return the weighted sum over a group's tasks, computed one by one in their order."""
    total: MetaGrad | None = None
    for task, weight in zip(group.tasks, group.weights, strict=True):
        share = gradient(meta, task)
        share = share if weight == 1.0 else scale(share, weight)
        total = share if total is None else add(total, share)
    assert total is not None
    return total


class TaskSum:
    """A function (meta, tasks, weights) -> sum_i weights_i * gradient(meta, task_i).

    The tasks may differ in shape; tasks whose signature has no plan use the loop. The arguments and ``plans`` determine
    the result to the bit. ``seconds`` is the total time of all sums so far, ``count`` the number of their tasks. If
    ``should_continue``, which may be set, returns False while a program is compiled, the compilation is abandoned with
    ``CompileStopped``.
    """

    def __init__(
        self,
        gradient: MetaGradient,
        folder: Path | Programs | None = None,
        draw: TaskDraw = ALL_SAMPLES,
        masks: Masks | None = None,
    ) -> None:
        """Start with the loop for all tasks.

        Args:
            gradient: the meta-gradient estimator.
            folder: holds compiled programs; nobody else may write to it. With a cache, programs are shared.
            draw: the samples that are drawn of a task before it comes here, which decide the shapes of plans.
            masks: the inputs that are sequences, and the masks with which they can be padded.
        """
        self.gradient = gradient
        self.masks: Masks = masks or {}
        self._draw = draw
        self.plans: dict[str, ExecutionPlan] = {}
        self._padded: dict[str, ExecutionPlan | None] = {}
        self.seconds, self.count = 0.0, 0
        self.should_continue: Callable[[], bool] = always_continue
        self._folder = folder
        self._stacked_sums: dict[ExecutionPlan, StackedSum] = {}
        self._like: Meta | None = None
        self._shares: tuple[tuple[float, ...], Tensor] = (), torch.empty(0)

    def example(self, task: Task) -> Task:
        """Return a task of the shape in which a sum meets ``task``."""
        return self._draw.draw(task, 0)

    def follow(self, plans: Iterable[ExecutionPlan]) -> None:
        """Use these plans from now on, in place of all earlier ones."""
        self.plans, self._padded = {plan.signature: plan for plan in plans}, {}

    def fit(self, task: Task) -> Task:
        """Return the task as it is computed: padded, if only a plan of a larger size can compute it."""
        signature = signature_of(task)
        if signature in self.plans:
            return task
        if signature not in self._padded:
            self._padded[signature] = self._find_padded_plan(task)
        plan = self._padded[signature]
        return task if plan is None else pad_task(task, plan.pad, self.masks)

    def _find_padded_plan(self, task: Task) -> ExecutionPlan | None:
        """Return the plan that pads the task the least; None if it is to be computed as it is."""
        sizes = measure(task, self.masks)
        fitting = [plan for plan in self.plans.values() if plan.pad and covers(plan.pad, sizes)]
        for plan in sorted(fitting, key=lambda plan: cost(plan.pad)):
            if signature_of(pad_task(task, plan.pad, self.masks)) == plan.signature:
                return None if plan.batching == "loop" else plan
        return None

    def add_program(self, plan: ExecutionPlan, program: Program) -> None:
        """Register the compiled program of a plan, so that it need not be loaded from the folder."""
        self._stacked_sums[plan] = as_stacked_sum(program)

    def prepare(self, meta: Meta, tasks: Sequence[Task]) -> None:
        """Load or compile the programs of the plans for ``tasks``; raises ``CompileError`` or ``CompileStopped``."""
        for group in group_tasks([*map(self.fit, tasks)], [1.0] * len(tasks), self.plans):
            plan = self.plans.get(group.signature, LOOP_PLAN)
            if plan.batching == "compiled" and plan not in self._stacked_sums:
                self._stacked_sum(plan, meta, *stack(group, plan.tasks, next(iter(meta.weights.values()))))

    def __call__(self, meta: Meta, tasks: Sequence[Task], weights: Sequence[float]) -> MetaGrad:
        """Return the weighted sum; raise ``ValueError`` for no tasks."""
        if torch.is_inference_mode_enabled():
            return outside_inference_mode(self.__call__)(meta, tasks, weights)
        total: MetaGrad | None = None
        began = time.perf_counter()
        meta = self._in_order(meta)
        if isinstance(tasks, StackedTasks) and (plan := self._find_stacked_plan(tasks)):
            total = self._sum_at_once(plan, meta, tasks, weights)
        else:
            for group in group_tasks([*map(self.fit, tasks)], weights, self.plans):
                share = self._sum(self.plans.get(group.signature, LOOP_PLAN), meta, group)
                total = share if total is None else add(total, share)
        if total is None:
            raise ValueError("a meta-gradient over no tasks is not defined: give one task or more")
        self.seconds += time.perf_counter() - began
        self.count += len(tasks)
        return total

    def _find_stacked_plan(self, tasks: StackedTasks) -> ExecutionPlan | None:
        """Return the plan that sums these tasks at once; None if there is none."""
        plan = self.plans.get(tasks.signature, LOOP_PLAN)
        return plan if plan.batching != "loop" and 0 < len(tasks) <= plan.tasks else None

    def _sum_at_once(self, plan: ExecutionPlan, meta: Meta, tasks: StackedTasks, weights: Sequence[float]) -> MetaGrad:
        rows = len(tasks) if plan.batching == "vmap" else plan.tasks
        stacked, spare = tasks.stack(rows), [0.0] * (rows - len(tasks))
        if self._shares[0] != (found := (*weights, *spare)):  # Most policies give each task the same weight.
            self._shares = found, weights_like(next(iter(meta.weights.values())), found)
        shares = self._shares[1]
        return self._stacked_sum(plan, meta, stacked, shares)(meta, stacked, shares)

    @outside_inference_mode
    def sum_stacked(self, meta: Meta, stacked: Task, weights: Tensor) -> MetaGrad:
        """Return the weighted sum over tasks that are already stacked along their first dimension."""
        meta = self._in_order(meta)
        plan = self.plans.get(signature_of(unstack_one(stacked, 0)), LOOP_PLAN)
        if plan.batching == "vmap" or (plan.batching != "loop" and plan.tasks == len(weights)):
            return self._stacked_sum(plan, meta, stacked, weights)(meta, stacked, weights)
        return self(meta, unstack(stacked), weights.tolist())

    def _in_order(self, meta: Meta) -> Meta:
        """Return the meta-parameters in the order of the first ones: a program takes tensors by position."""
        if self._like is None:
            self._like = Meta(*({name: value.new_empty(0) for name, value in part.items()} for part in meta))
        return order_like(meta, self._like)

    def _sum(self, plan: ExecutionPlan, meta: Meta, group: Group) -> MetaGrad:
        if plan.batching == "loop":
            return sum_in_loop(self.gradient, meta, group)
        rows = len(group.tasks) if plan.batching == "vmap" else plan.tasks
        stacked, weights = stack(group, rows, next(iter(meta.weights.values())))
        return self._stacked_sum(plan, meta, stacked, weights)(meta, stacked, weights)

    def _stacked_sum(self, plan: ExecutionPlan, meta: Meta, stacked: Task, weights: Tensor) -> StackedSum:
        if plan not in self._stacked_sums:
            self._stacked_sums[plan] = self._build_stacked_sum(plan, meta, stacked, weights)
        return self._stacked_sums[plan]

    def _build_stacked_sum(self, plan: ExecutionPlan, meta: Meta, stacked: Task, weights: Tensor) -> StackedSum:
        stacked_sum = vmapped(self.gradient)
        if plan.batching == "vmap":
            return stacked_sum
        program = (
            load_program(self._folder, plan.program)
            if plan.batching == "compiled" and self._folder and plan.program
            else None
        )
        if program is not None:
            return as_stacked_sum(program)
        traced = trace(stacked_sum, meta, stacked, weights, self.should_continue)
        if plan.program and traced.digest != plan.program:
            log.warning(
                "program %s cannot be reproduced here: the model, the torch version or the CPU may differ", plan.program
            )
        if plan.batching == "traced":
            return as_stacked_sum(traced.graph)
        if self._folder is None:
            raise ValueError("a plan with batching 'compiled' needs a folder for its program")
        program = load_program(self._folder, traced.digest)
        return as_stacked_sum(program or compile_now(traced, self._folder, self.should_continue))


SkippingSum = Callable[[Meta, Sequence[Task], Sequence[ReplaySample]], tuple[MetaGrad, float]]
"""(meta, tasks, their replay samples) -> the weighted sum of the finite gradients, and the sum of their shares."""


def sum_skipping_nonfinite(task_sum: TaskSum, *, check: bool = True) -> SkippingSum:
    """Return a sum that leaves out tasks whose loss or gradient is not finite, and their shares.

    Otherwise one such task would make every meta-step that replays it fail. The tasks are recomputed one by one only
    if their sum is not finite. Over no tasks the sum is zeros and the share is 0.

    Args:
        task_sum: sums the gradients of all tasks.
        check: whether the sum is checked; if not, no task is left out, and the caller finds out.
    """

    def sum_tasks(meta: Meta, tasks: Sequence[Task], samples: Sequence[ReplaySample]) -> tuple[MetaGrad, float]:
        if tasks:
            total = task_sum(meta, tasks, [sample.weight for sample in samples])
            if not check or is_finite(total):
                return total, sum(sample.share for sample in samples)
        return _one_by_one(task_sum.gradient, meta, tasks, samples, lambda gradient: None)

    return sum_tasks


def sum_with_measurements(
    gradient: MetaGradient, measure: Callable[[MetaGrad], Tensor], on_measured: Callable[[list[float]], None]
) -> SkippingSum:
    """Return the sum of ``sum_skipping_nonfinite``, computed task by task with a measurement of each gradient.

    Each task's ``measure(gradient)``, a vector, is passed to ``on_measured`` as a list of floats; all are NaN if the
    gradient is not finite.
    """

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


FEW_NUMBERS = 1 << 16
"""The largest number of entries that are copied into one tensor to be summed at once."""


def is_finite(*trees: object) -> bool:
    """Return whether all tensors in the trees are finite."""
    leaves: list[Tensor] = []
    flatten(trees, leaves)
    if (
        0 < sum(leaf.numel() for leaf in leaves) <= FEW_NUMBERS
        and len({(leaf.dtype, leaf.device) for leaf in leaves}) == 1
    ):
        leaves = [torch.cat([leaf.reshape(-1) for leaf in leaves])]  # One sum is quicker than one for each tensor.
    # A sum in float64 is finite if and only if all its numbers are: those of float32 do not overflow it.
    sums = [_sum_in_float64(leaf) for leaf in leaves]
    if len(sums) == 1:
        return math.isfinite(float(sums[0]))
    return not sums or bool(torch.isfinite(torch.stack(sums)).all())


def _sum_in_float64(leaf: Tensor) -> Tensor:
    """Return the sum of a tensor, or what is finite if and only if all its numbers are, where a sum might overflow."""
    if leaf.dtype in (torch.float16, torch.bfloat16, torch.float32):
        return leaf.sum(dtype=torch.float64)
    return torch.where(torch.isfinite(leaf).all(), 0.0, torch.nan).double()
