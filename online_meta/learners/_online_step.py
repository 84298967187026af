"""Functions shared by learners that learn each task once when it arrives and revisit none."""

from collections.abc import Mapping

from torch import Tensor

from online_meta.meta_optimizer import copy_to_cpu
from online_meta.registry import nearest
from online_meta.tree import zeros
from online_meta.types import Engine, MetaGrad, Params, StepReport, TensorFilter


def apply_from_first_rank(engine: Engine, found: MetaGrad) -> StepReport:
    """Make a meta-step with the first rank's gradient for one task. Collective: all ranks must call it.

    The other ranks contribute zeros with a share of 0, so the step has the same bits for any number of ranks.
    """
    mine = (found, 1.0) if engine.rank == 0 else (zeros(found), 0.0)
    return engine.apply(*(mine if engine.gather is None else engine.gather(*mine)[0]))


def copy_state(state: Mapping[str, Params], keep: TensorFilter | None) -> Params:
    """Return CPU copies of a learner's own ``state`` as ``part.name``; only names that ``keep`` accepts."""
    named = {f"{part}.{name}": value for part, values in state.items() for name, value in values.items()}
    return {name: copy_to_cpu(value) for name, value in named.items() if keep is None or keep(name)}


def restore_state(saved: Params, part: str, like: Params) -> Params:
    """Remove a ``part`` of a learner's own state from ``saved``; return it with the devices and dtypes of ``like``.

    Raises ``ValueError`` if a name is missing or a shape differs.
    """
    return {name: _restore_tensor(saved, f"{part}.{name}", value) for name, value in like.items()}


def _restore_tensor(saved: Params, name: str, like: Tensor) -> Tensor:
    if name not in saved:
        raise ValueError(f"saved is no {name}: {nearest(name, saved)}")
    if saved[name].shape != like.shape:
        raise ValueError(f"saved {name} has shape {tuple(saved[name].shape)}; this model's has {tuple(like.shape)}")
    return saved.pop(name).detach().to(like.device, like.dtype, copy=True)
