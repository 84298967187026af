"""What learners have in common that learn each task once, as it comes, and revisit none."""

from collections.abc import Mapping

import torch
from torch import Tensor

from online_meta.meta_optimizer import copy_to_cpu
from online_meta.registry import nearest
from online_meta.tree import zeros
from online_meta.types import Batch, Engine, MetaGrad, Params, StepReport, Task, TensorFilter


def apply_from_first_rank(engine: Engine, found: MetaGrad) -> StepReport:
    """Make a meta-step on what every rank has found for one task; the first rank's gradient is the one that counts.

    The others take part with nothing, a share of 0: so the step has the same bits, whatever their number is.
    """
    mine = (found, 1.0) if engine.rank == 0 else (zeros(found), 0.0)
    return engine.apply(*(mine if engine.gather is None else engine.gather(*mine)[0]))


def concat_support_query(task: Task) -> Batch:
    """Return the samples of the support and of the query set together."""
    return Batch(*(torch.cat(pair) for pair in zip(task.support, task.query, strict=True)))


def copy_state(state: Mapping[str, Params], keep: TensorFilter | None) -> Params:
    """Return copies of a learner's own ``state``, or of what ``keep`` keeps of it, as ``part.name``; on the CPU."""
    named = {f"{part}.{name}": value for part, values in state.items() for name, value in values.items()}
    return {name: copy_to_cpu(value) for name, value in named.items() if keep is None or keep(name)}


def restore_state(saved: Params, part: str, like: Params) -> Params:
    """Take a ``part`` of a learner's own state out of what it ``saved``, and return it where ``like`` lies.

    Raises ``ValueError`` for a name that is missing, or a shape that is another.
    """
    return {name: _restore_tensor(saved, f"{part}.{name}", value) for name, value in like.items()}


def _restore_tensor(saved: Params, name: str, like: Tensor) -> Tensor:
    if name not in saved:
        raise ValueError(f"saved is no {name}: {nearest(name, saved)}")
    if saved[name].shape != like.shape:
        raise ValueError(f"saved {name} has shape {tuple(saved[name].shape)}; this model's has {tuple(like.shape)}")
    return saved.pop(name).detach().to(like.device, like.dtype, copy=True)
