"""What a rank will need at its peak, in words, before the first round."""

from dataclasses import replace

import torch

from deploy.config import Config
from deploy.model_check import format_open_dimensions, make_synthetic_task
from online_meta.setup import LearnerContext
from online_meta.types import Batch, Engine, Meta, Task
from streams.spec import is_dynamic
from trainers.build import build_learners
from trainers.memory_estimate import MemoryEstimate, estimate_memory

UNITS = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


def format_memory(config: Config, context: LearnerContext, example: Task | None) -> str:
    """Return the estimate for tasks like the one given, or like a made-up one, as a short table."""
    device = torch.device(config.engine.device)
    task = make_synthetic_task(config.task, device) if example is None else _to_device(example, device)
    found = estimate_memory(config.trainer(), context.inner, context.start, task, _count_engines(config, context))
    note = "" if example else f", made up for none is known yet{format_open_dimensions(config.task)}"
    varying = "; larger ones need more" if is_dynamic(config.task.x_shape) else ""
    return (
        f"{_format_bytes(found.peak)} a rank at its peak, estimated: beside the process itself, for tasks of "
        f"{len(task.support.x)} + {len(task.query.x)} samples{note}{varying}{''.join(map(_format_part, _list_parts(found)))}"
    )


def _list_parts(found: MemoryEstimate) -> list[tuple[str, int]]:
    """Return what the peak is made of, and what is in it where tasks are stacked."""
    computing = [
        ("the inner trajectory", found.trajectory),
        ("one step's graph and gradients", found.graph),
        ("the sum over tasks", found.sums),
    ]
    in_turn = computing if sum(size for _, size in computing) >= found.step else [("a meta-step", found.step)]
    parts = [("meta-parameters and optimizers", found.stored), ("frozen weights and buffers", found.frozen), *in_turn]
    more = [] if found.stacked is None else [("more for each further task stacked with another", found.stacked)]
    return [(what, size) for what, size in [*parts, *more] if size]


def _format_part(part: tuple[str, int]) -> str:
    what, size = part
    return f"\n{'':<8} {_format_bytes(size):>9}  {what}"


def _count_engines(config: Config, context: LearnerContext) -> int:
    """Return how many of the learners have an engine, and with it copies of the meta-parameters."""
    made = []

    def counted(meta: Meta) -> Engine:
        made.append(meta)
        return context.engine(meta)

    build_learners(config.trainer(), replace(context, engine=counted))
    return len(made)


def _to_device(task: Task, device: torch.device) -> Task:
    return Task(*(Batch(*(tensor.to(device) for tensor in batch)) for batch in task))


def _format_bytes(count: int) -> str:
    return next((f"{count / unit:.3g} {name}" for unit, name in UNITS if count >= unit), f"{count} B")
