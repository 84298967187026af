"""Optimizer state out of, and into, DeepSpeed's shards of it, as full tensors by parameter."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from online_meta.meta_optimizer import STATE, saved_state
from online_meta.types import Params

WHOLE = ("step", "mu_product")
"""State that is one number a parameter: it is the same for all, and not sharded."""


def save_state(engine: Any, stage: int, parts: Params, shapes: Mapping[str, torch.Size]) -> Params:
    """Return the state of each parameter in full, under the names of ``MetaOptimizer.save``; a collective."""
    from deepspeed.utils import safe_get_full_optimizer_state

    states = _optimizer(engine, stage).state
    saved = {}
    for key in _keys(states, _shards(engine, stage)):
        for name, part in parts.items():
            if key in WHOLE:
                value = next(state[key] for state in states.values() if key in state)
            else:
                value = (states[part][key] if stage == 0 else safe_get_full_optimizer_state(part, key)).view(
                    shapes[name]
                )
            saved[f"{STATE}{key}.{name}"] = value.detach().clone()
    return saved


def load_state(engine: Any, stage: int, parts: Params, saved: Params) -> None:
    """Replace the parameters that are stepped, and their state, by what ``saved`` holds; a collective."""
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

    optimizer, shards, given = _optimizer(engine, stage), _shards(engine, stage), saved_state(saved)
    optimizer.state.clear()
    if stage == 0:
        for (key, name), value in given.items():
            optimizer.state[parts[name]][key] = value.detach().clone().reshape(() if key in WHOLE else -1)
        return
    for key, value in {key: value for (key, _), value in given.items()}.items():
        for shard in shards:
            optimizer.state[shard][key] = value.detach().clone() if key in WHOLE else torch.zeros_like(shard)
    if stage < 3:  # The fragments of the state that belong to a parameter are found out once.
        engine.optimizer._hp_optimizer_states_linked = False
        if given:
            engine.optimizer._lazy_init_hp_params_optimizer_state()
    for name, part in parts.items():
        safe_set_full_fp32_param(part, saved[name].reshape(-1))
    for (key, name), value in given.items():
        if key not in WHOLE:
            safe_set_full_optimizer_state(parts[name], value.reshape(-1), key)


def _optimizer(engine: Any, stage: int) -> torch.optim.Optimizer:
    """Return the optimizer of torch that is behind DeepSpeed's."""
    optimizer: torch.optim.Optimizer = engine.optimizer if stage == 0 else engine.optimizer.optimizer
    return optimizer


def _shards(engine: Any, stage: int) -> list[Tensor]:
    """Return what the optimizer of torch steps on this rank: parameters, or flat shards of them."""
    if stage == 0:
        return [part for group in engine.optimizer.param_groups for part in group["params"]]
    optimizer = engine.optimizer
    return list(optimizer.single_partition_of_fp32_groups if stage < 3 else optimizer.fp32_partitioned_groups_flat)


def _keys(states: Mapping[Any, Mapping[str, Any]], shards: list[Tensor]) -> list[str]:
    found = {key for shard in shards for key, value in states.get(shard, {}).items() if isinstance(value, Tensor)}
    return sorted(found)
