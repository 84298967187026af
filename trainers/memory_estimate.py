"""How much memory a rank will need at its peak, told before training: nothing of it is allocated."""

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from online_meta.functional import ModelLoss
from online_meta.gradient_memory import Estimator, gradient_peak
from online_meta.inner import Inner
from online_meta.memory import bytes_of
from online_meta.meta_optimizer import make_optimizer
from online_meta.types import Meta, Task
from trainers.build import build_gradient
from trainers.settings import MetaSettings, TrainerSettings

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
