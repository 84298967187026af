"""What a rank will need at its peak, in words, before the first round."""

from dataclasses import replace

import torch

from deploy.config import Config
from deploy.model_check import made_up_task, tell_open
from online_meta.setup import LearnerSetup
from online_meta.types import Batch, Engine, Meta, Task
from streams.spec import is_dynamic
from trainers.build import build_learners
from trainers.memory_estimate import MemoryEstimate, estimate

UNITS = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


def tell_memory(config: Config, setup: LearnerSetup, like: Task | None) -> str:
    """Return the estimate for tasks like the one given, or like a made-up one, as a short table."""
    device = torch.device(config.engine.device)
    task = made_up_task(config.task, device) if like is None else _on(like, device)
    found = estimate(config.trainer(), setup.inner, setup.start, task, _engines(config, setup))
    made_up = "" if like else f", made up for none is known yet{tell_open(config.task)}"
    varying = "; larger ones need more" if is_dynamic(config.task.x_shape) else ""
    return (
        f"{_size(found.peak)} a rank at its peak, estimated: beside the process itself, for tasks of "
        f"{len(task.support.x)} + {len(task.query.x)} samples{made_up}{varying}{''.join(map(_line, _parts(found)))}"
    )


def _parts(found: MemoryEstimate) -> list[tuple[str, int]]:
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


def _line(part: tuple[str, int]) -> str:
    what, size = part
    return f"\n{'':<8} {_size(size):>9}  {what}"


def _engines(config: Config, setup: LearnerSetup) -> int:
    """Return how many of the learners have an engine, and with it copies of the meta-parameters."""
    made = []

    def counted(meta: Meta) -> Engine:
        made.append(meta)
        return setup.engine(meta)

    build_learners(config.trainer(), replace(setup, engine=counted))
    return len(made)


def _on(task: Task, device: torch.device) -> Task:
    return Task(*(Batch(*(tensor.to(device) for tensor in batch)) for batch in task))


def _size(count: int) -> str:
    return next((f"{count / unit:.3g} {name}" for unit, name in UNITS if count >= unit), f"{count} B")
