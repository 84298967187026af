"""Optimizer state out of, and into, DeepSpeed's shards of it, as full tensors by parameter."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from online_meta.meta_optimizer import SCALAR_STATE, STATE_PREFIX, copy_to_cpu, saved_state
from online_meta.types import Params, TensorFilter


def save_state(
    engine: Any, stage: int, parts: Params, shapes: Mapping[str, torch.Size], keep: TensorFilter | None
) -> Params:
    """Return the state of each parameter in full, under the names of ``MetaOptimizer.save``; a collective."""
    states = get_torch_optimizer(engine, stage).state
    saved = {}
    for key in _keys(states, _stepped_tensors(engine, stage)):
        same = next(state[key] for state in states.values() if key in state)
        values = dict.fromkeys(parts, same) if key in SCALAR_STATE else _gather(states, stage, parts, key)
        for name in parts:
            value = values[name] if key in SCALAR_STATE else values[name].view(shapes[name])
            full = f"{STATE_PREFIX}{key}.{name}"
            if not keep or keep(full):
                saved[full] = copy_to_cpu(value)
    return saved


def _gather(states: Mapping[Any, Mapping[str, Any]], stage: int, parts: Params, key: str) -> Params:
    """Return a key of the state of each parameter in full, flat, on every rank."""
    from deepspeed.utils import safe_get_full_optimizer_state

    if stage == 0:
        return {name: states[part][key] for name, part in parts.items()}
    if stage == 3:
        return {name: safe_get_full_optimizer_state(part, key) for name, part in parts.items()}
    # The same for all parameters at once: a collective for each would let training stand still for longer.
    sizes = [part.numel() for part in parts.values()]
    packed = next(iter(parts.values())).new_zeros(sum(sizes))
    state_views = dict(zip(parts, torch.split(packed, sizes), strict=True))
    for name, part in parts.items():
        mapping = part._hp_mapping  # type: ignore[attr-defined]  # DeepSpeed's: which piece of it lies here
        if mapping is not None:
            fragment = mapping.lp_fragment_address
            state_views[name].narrow(0, fragment.start, fragment.numel).copy_(mapping.get_optim_state_fragment(key))
    dist.all_reduce(packed)
    return state_views


def load_state(engine: Any, stage: int, parts: Params, saved: Params) -> None:
    """Replace the parameters that are stepped, and their state, by what ``saved`` holds; a collective."""
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

    optimizer, shards, saved_values = (
        get_torch_optimizer(engine, stage),
        _stepped_tensors(engine, stage),
        saved_state(saved),
    )
    optimizer.state.clear()
    if stage == 0:
        for (key, name), value in saved_values.items():
            value = value.detach().clone()
            optimizer.state[parts[name]][key] = (
                value if key in SCALAR_STATE else value.reshape(-1).to(parts[name].device)
            )
        return
    for key, value in {key: value for (key, _), value in saved_values.items()}.items():
        for shard in shards:
            optimizer.state[shard][key] = value.detach().clone() if key in SCALAR_STATE else torch.zeros_like(shard)
    if stage < 3:  # The fragments of the state that belong to a parameter are found out once.
        engine.optimizer._hp_optimizer_states_linked = False
        if saved_values:
            engine.optimizer._lazy_init_hp_params_optimizer_state()
    for name, part in parts.items():
        safe_set_full_fp32_param(part, saved[name].reshape(-1).to(part.device))
    for (key, name), value in saved_values.items():
        if key not in SCALAR_STATE:
            safe_set_full_optimizer_state(parts[name], value.reshape(-1).to(parts[name].device), key)


def get_torch_optimizer(engine: Any, stage: int) -> torch.optim.Optimizer:
    """Return the optimizer of torch that is behind DeepSpeed's."""
    optimizer: torch.optim.Optimizer = engine.optimizer if stage == 0 else engine.optimizer.optimizer
    return optimizer


def _stepped_tensors(engine: Any, stage: int) -> list[Tensor]:
    """Return what the optimizer of torch steps on this rank: parameters, or flat shards of them."""
    if stage == 0:
        return [part for group in engine.optimizer.param_groups for part in group["params"]]
    optimizer = engine.optimizer
    return list(optimizer.single_partition_of_fp32_groups if stage < 3 else optimizer.fp32_partitioned_groups_flat)


def _keys(states: Mapping[Any, Mapping[str, Any]], shards: list[Tensor]) -> list[str]:
    found = {key for shard in shards for key, value in states.get(shard, {}).items() if isinstance(value, Tensor)}
    return sorted(found)
