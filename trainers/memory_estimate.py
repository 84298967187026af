"""Estimate a rank's peak memory before training, without allocating it."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map

from online_meta.batching.plan import Group, stack, vmapped
from online_meta.functional.model import ModelLoss
from online_meta.inner import Inner
from online_meta.memory import bytes_of, peak_bytes
from online_meta.meta_optimizer import flatten_meta, make_optimizer, plan_packing
from online_meta.types import Meta, MetaGrad, MetaGradient, Task
from trainers.build import build_gradient
from trainers.settings import MetaSettings, TrainerSettings

Estimator = Callable[[int], MetaGradient]
"""Returns the estimator of the meta-gradient for a number of inner steps."""


PROBE_STEPS = 2
"""Inner steps of the first measurement; a second one with one more step shows what a step adds."""


class GradientPeak(NamedTuple):
    """Bytes at the peak of a meta-gradient.

    Attributes:
        trajectory: of the stored points of the inner loop.
        graph: of everything else: one step's graph and gradients.
    """

    trajectory: int
    graph: int

    @property
    def total(self) -> int:
        """The sum of both."""
        return self.trajectory + self.graph


def stored_points(steps: int, *, rematerialise: bool = False, offload: bool = False) -> int:
    """Return the largest number of trajectory points in the memory of the device at once.

    The number is K. With rematerialisation it is at most ceil(K / s) - 1 + s, s = ceil(sqrt(K)) (see ``pull_back``).
    With offloading it is at most 2: one in use and the next one in transfer.

    Args:
        steps: number K of inner steps.
        rematerialise: whether segments of the trajectory are recomputed.
        offload: whether points are moved to the memory of the host.
    """
    if offload:
        return min(steps, PROBE_STEPS)
    if not rematerialise or steps < PROBE_STEPS:
        return steps
    segment_length = math.isqrt(steps - 1) + 1
    starts = -(-steps // segment_length)
    last = steps - (starts - 1) * segment_length
    # Forward: all starts and the last segment. Backward: one start fewer and a full segment.
    return max(starts - 1 + last, starts - 2 + segment_length)


def gradient_peak(
    estimator: Estimator,
    meta: Meta,
    task: Task,
    steps: int,
    *,
    rematerialise: bool = False,
    offload: bool = False,
    rows: int = 0,
) -> GradientPeak:
    """Return the peak memory of a meta-gradient, without the meta-parameters and the tasks themselves.

    Peak(K) = Peak(2) + (points(K) - points(2)) (Peak(3) - Peak(2)). Peak(2) and Peak(3) are measured by running the
    estimator on fake tensors, which need no memory.

    Args:
        estimator: returns the meta-gradient for a number of inner steps.
        meta: meta-parameters.
        task: example of a task.
        steps: number K of inner steps.
        rematerialise: whether segments of the trajectory are recomputed.
        offload: whether points are moved to the memory of the host.
        rows: number of tasks that are stacked; 0 for a single task without stacking.
    """

    def peak(steps: int) -> int:
        return _measure_peak(estimator(steps), meta, task, rows)

    if steps <= PROBE_STEPS:
        return GradientPeak(0, peak(steps))
    few, more = peak(PROBE_STEPS), peak(PROBE_STEPS + 1)
    points = stored_points(steps, rematerialise=rematerialise, offload=offload)
    trajectory = (more - few) * points
    return GradientPeak(trajectory, few + (more - few) * (points - PROBE_STEPS) - trajectory)


def _measure_peak(gradient: MetaGradient, meta: Meta, task: Task, rows: int) -> int:
    def work(meta: Meta, task: Task) -> MetaGrad:
        if not rows:
            return gradient(meta, task)
        stacked = stack(Group("", [task] * rows, [1.0] * rows), rows, next(iter(meta.weights.values())))
        return vmapped(gradient)(meta, *stacked)

    try:
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            given = tree_map(mode.from_tensor, (meta, task))
            return peak_bytes(lambda: work(*given))
    except Exception:  # A model that reads values (float(), .item()) fails on fake tensors: run it on real ones.
        return peak_bytes(lambda: work(meta, task))


TRAJECTORY_OPTIONS = ("rematerialise", "offload", "step_weights")
"""Options of ``exact`` that affect how much of the trajectory is stored, but not the memory of a step."""


class MemoryEstimate(NamedTuple):
    """The bytes of a rank at its peak, by purpose.

    The peak occurs either while a meta-gradient is computed (``trajectory``, ``graph``, ``sums``) or during a meta-step
    (``step``); ``peak`` counts the larger of the two.

    Attributes:
        stored: meta-parameters, optimizer state and the full copy that is adapted, of all learners.
        frozen: weights and buffers that are not learned.
        trajectory: stored points of the inner loop.
        graph: one step's graph and gradients.
        sums: sum of the meta-gradients of earlier tasks.
        step: temporary memory of a meta-step.
        stacked: addition for each further task that is computed at once; None if tasks are computed one by one.
    """

    stored: int
    frozen: int
    trajectory: int
    graph: int
    sums: int
    step: int
    stacked: int | None

    @property
    def peak(self) -> int:
        """The bytes at the peak if tasks are computed one by one."""
        return self.stored + self.frozen + max(self.trajectory + self.graph + self.sums, self.step)


def estimate_memory(
    settings: TrainerSettings, inner: Inner, meta: Meta, task: Task, learners: int = 1
) -> MemoryEstimate:
    """Estimate the peak memory of a rank.

    Only tensors are counted, not the process, its libraries and the workspace of kernels.

    Args:
        settings: of the run.
        inner: inner loop of the model.
        meta: initial meta-parameters.
        task: example of a task.
        learners: number of learners that have an engine.
    """
    options = settings.meta.options
    enabled = {key: bool(options.get(key, False)) for key in ("rematerialise", "offload")}
    enabled["offload"] = enabled["offload"] and settings.engine.device != "cpu"
    estimator = _estimator(settings.meta, inner)
    gradient = gradient_peak(estimator, meta, task, inner.steps, **enabled)
    engine, learned = estimate_engine_bytes(settings, meta), bytes_of(meta)
    frozen = inner.loss.constant_bytes if isinstance(inner.loss, ModelLoss) else 0
    return MemoryEstimate(
        stored=learned + learners * engine.stored,
        frozen=frozen,
        trajectory=gradient.trajectory,
        graph=gradient.graph,
        sums=learned if settings.meta.batch > 1 else 0,
        step=engine.step,
        stacked=_estimate_stacked_task(settings, estimator, meta, task, inner.steps),
    )


class EngineBytes(NamedTuple):
    """Bytes of an engine: ``stored`` between meta-steps, and ``step`` in addition during a meta-step."""

    stored: int
    step: int


COMPUTED = {"sgd": 0, "adagrad": 1, "adamax": 1, "rmsprop": 1}
"""How many numbers an optimizer computes per parameter of the buffer that it steps; 2 for others."""


def estimate_engine_bytes(settings: TrainerSettings, meta: Meta) -> EngineBytes:
    """Return the memory of an engine.

    In units of the size of the meta-parameters in float32, with s numbers of optimizer state per parameter and n ranks:
    the local engine stores 1 + s, and a step takes 2, for the sums and their mean, and up to 2 more for what the
    optimizer computes of the largest buffer. DeepSpeed stores 2 + s at ZeRO stage 0, 3 + (1 + s) / n at stages 1 and 2,
    and 2 + (3 + s) / n at stage 3, including the full copy that the rank adapts. A step takes 5, for packed sums and
    DeepSpeed's own gradients, or 4 on one rank at stage 0. The numbers for DeepSpeed were measured with version 0.19 on
    1, 2 and 4 ranks.

    Args:
        settings: of the run.
        meta: the meta-parameters.
    """
    engine, state, learned = settings.engine, _state_numbers(settings.meta), bytes_of(meta)
    if engine.kind == "local":
        sizes = {name: bytes_of(value) for name, value in flatten_meta(meta).items()}
        buffers = [[sizes[name] for name in names] for names in plan_packing(flatten_meta(meta)).names]
        computed = COMPUTED.get(settings.meta.optimizer, 2) * max(map(sum, buffers))
        return EngineBytes((1 + state) * learned, 2 * learned + computed)
    n, stage = engine.processes, engine.zero_stage
    state = 0 if engine.offload_optimizer and engine.device != "cpu" else state
    stored = (2 + state, 3 + (1 + state) / n, 3 + (1 + state) / n, 2 + (3 + state) / n)[stage]
    packed = 1 if n > 1 else 0
    gathered = n if engine.deterministic else 0
    step = (4 + packed if stage == 0 else 5) * learned
    return EngineBytes(int(stored * learned), step + gathered * learned)


def _state_numbers(settings: MetaSettings) -> int:
    """Return how many numbers of state an optimizer has per parameter, from one step of it."""
    parameter = torch.zeros(2, requires_grad=True)
    parameter.grad = torch.ones(2)
    made = make_optimizer(settings.optimizer, [parameter], 0.1, settings.optimizer_options)
    made.step()
    return sum(isinstance(value, Tensor) and value.shape == (2,) for value in made.state[parameter].values())


def _estimator(settings: MetaSettings, inner: Inner) -> Estimator:
    """Return the estimator by its number of steps; without seeding of random numbers, which reads the task's values."""
    options = {key: value for key, value in settings.options.items() if key not in TRAJECTORY_OPTIONS}
    plain = replace(settings, options=options)
    loss: Any = replace(inner.loss, random=False) if isinstance(inner.loss, ModelLoss) else inner.loss
    deterministic = replace(inner, loss=loss, rule=inner.rule._replace(random=False))
    return lambda steps: build_gradient(plain, replace(deterministic, steps=steps))


def _estimate_stacked_task(
    settings: TrainerSettings, estimator: Estimator, meta: Meta, task: Task, steps: int
) -> int | None:
    if settings.engine.batching == "loop" or settings.meta.batch == 1:
        return None
    try:
        one, two = (gradient_peak(estimator, meta, task, steps, rows=rows).total for rows in (1, 2))
    except Exception:  # A model that cannot be stacked may raise anything; its tasks are learned one by one.
        return None
    return two - one
