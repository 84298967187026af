"""How much memory a rank will need at its peak, told before training: nothing of it is allocated."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map

from online_meta.batching.plan import Group, stack, vmapped
from online_meta.functional.model import ModelLoss
from online_meta.inner import Inner
from online_meta.memory import bytes_of, peak_bytes
from online_meta.meta_optimizer import make_optimizer
from online_meta.types import Meta, MetaGrad, MetaGradient, Task
from trainers.build import build_gradient
from trainers.settings import MetaSettings, TrainerSettings

Estimator = Callable[[int], MetaGradient]
"""The number of inner steps -> the estimator of the meta-gradient with so many."""


PROBE_STEPS = 2
"""Inner steps that are run to see what a step takes; one more shows what a step adds."""


class GradientPeak(NamedTuple):
    """Bytes at the peak of a meta-gradient: the kept ``trajectory``, and all else, a ``graph`` and gradients."""

    trajectory: int
    graph: int

    @property
    def total(self) -> int:
        """Both together."""
        return self.trajectory + self.graph


def stored_points(steps: int, *, rematerialise: bool = False, offload: bool = False) -> int:
    """Return how many points of the trajectory lie in the memory of the device at once.

    K, or ceil(K / s) - 1 + s with s = ceil(sqrt(K)) rematerialised (see ``pull_back``); offloaded one is worked on
    while the next is made.
    """
    if offload:
        return min(steps, PROBE_STEPS)
    if not rematerialise or steps < PROBE_STEPS:
        return steps
    segment_length = math.isqrt(steps - 1) + 1
    starts = -(-steps // segment_length)
    last = steps - (starts - 1) * segment_length
    # Going forth the last stretch is kept after all starts; going back, the stretch before it after one start less.
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
    """Return the peak of a meta-gradient of ``steps`` inner steps, the meta-parameters and the tasks not counted.

    Peak(K) = Peak(2) + (kept(K) - kept(2)) (Peak(3) - Peak(2)), each measured by running the estimator on tensors
    without memory. With ``rows`` above 0 so many tasks are stacked.
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
    except Exception:  # A model that looks at numbers (float(), .item()) needs some: it is run in earnest.
        return peak_bytes(lambda: work(meta, task))


TRAJECTORY_OPTIONS = ("rematerialise", "offload", "step_weights")
"""Options of ``exact`` that decide how much of the trajectory is kept, and not what a step takes."""


class MemoryEstimate(NamedTuple):
    """Bytes of a rank at its peak, by what they are for; they add up to ``peak``.

    ``stored`` are the meta-parameters, their optimizer's state and the full copy that is adapted, of all learners;
    ``frozen`` weights and buffers that are not learned; the peak comes either while a meta-gradient is computed
    (``trajectory``, ``graph``, ``sums`` over the tasks before) or while a meta-step is made (``step``), and the other
    of the two is left out. ``stacked`` is what each further task adds where several are computed at once; None where
    the model goes task by task.
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
        """The bytes at the peak with tasks computed one by one."""
        return self.stored + self.frozen + max(self.trajectory + self.graph + self.sums, self.step)


def estimate_memory(
    settings: TrainerSettings, inner: Inner, meta: Meta, task: Task, learners: int = 1
) -> MemoryEstimate:
    """Return what a rank needs at its peak to learn tasks like ``task``; ``learners`` have an engine each.

    Tensors are counted, not the process itself, its libraries and what kernels use inside of an operation.
    """
    options = settings.meta.options
    enabled = {key: bool(options.get(key, False)) for key in ("rematerialise", "offload")}
    enabled["offload"] = enabled["offload"] and settings.engine.device != "cpu"
    estimator = _estimator(settings.meta, inner)
    gradient = gradient_peak(estimator, meta, task, inner.steps, **enabled)
    learned, largest = bytes_of(meta), max(bytes_of(leaf) for leaf in tree_leaves(meta))
    engine = estimate_engine_bytes(settings, learned, largest)
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
    """What an engine holds between meta-steps, its ``stored`` bytes, and what a ``step`` takes beside."""

    stored: int
    step: int


def estimate_engine_bytes(settings: TrainerSettings, learned: int, largest: int) -> EngineBytes:
    """Return what the engine takes for ``learned`` bytes of meta-parameters, ``largest`` of which are one tensor.

    In units of the learned parameters P (32 bits each), with s numbers of state a parameter and n ranks: the local
    engine holds 1 + s, and a step takes 3: the sums, their mean, the mean clipped. DeepSpeed holds 2 + s at ZeRO
    stage 0, 3 + (1 + s) / n at 1 and 2, 2 + (3 + s) / n at 3, the full copy that the rank adapts among them; a step
    takes 5, for packing what is reduced and for its own gradients, or 4 on one rank at stage 0. That is what DeepSpeed
    0.19 was seen to hold with 1, 2 and 4 ranks.
    """
    engine, state = settings.engine, _state_numbers(settings.meta.optimizer)
    averaging = 4 * largest  # Each gradient is squared in float64, one at a time.
    if engine.kind == "local":
        return EngineBytes((1 + state) * learned, max(3 * learned, 2 * learned + averaging))
    n, stage = engine.processes, engine.zero_stage
    state = 0 if engine.offload_optimizer and engine.device != "cpu" else state
    stored = (2 + state, 3 + (1 + state) / n, 3 + (1 + state) / n, 2 + (3 + state) / n)[stage]
    packed = 1 if n > 1 else 0
    gathered = n if engine.deterministic else 0
    step = max((4 + packed if stage == 0 else 5) * learned, (2 + packed) * learned + averaging)
    return EngineBytes(int(stored * learned), step + gathered * learned)


def _state_numbers(optimizer: str) -> int:
    """Return how many numbers an optimizer remembers for each parameter, by letting it step once."""
    parameter = torch.zeros(2, requires_grad=True)
    parameter.grad = torch.ones(2)
    made = make_optimizer(optimizer, [parameter], 0.1)
    made.step()
    return sum(isinstance(value, Tensor) and value.shape == (2,) for value in made.state[parameter].values())


def _estimator(settings: MetaSettings, inner: Inner) -> Estimator:
    """Return the estimator by its steps; random numbers are drawn, but not seeded, for that reads the task's bytes."""
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
    except Exception:  # What cannot be stacked says so in many ways, and is then learned task by task.
        return None
    return two - one
