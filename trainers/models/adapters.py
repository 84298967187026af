"""Read and write low-rank additions as the library ``peft`` does: adapter_config.json and adapter_model.safetensors."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from trainers.models.lora import LowRankLinear

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
"""What ``peft`` puts before the name of a weight."""

A, B = ".lora_A.weight", ".lora_B.weight"

PLAIN: dict[str, tuple[Any, ...]] = {
    "bias": (None, "none"),
    "fan_in_fan_out": (None, False),
    "use_dora": (None, False),
    "lora_bias": (None, False),
    "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}),
    "layer_replication": (None,),
    "trainable_token_indices": (None,),
    "alora_invocation_tokens": (None,),
}
"""What options of an adapter must be, because with other values it computes something else than W x + b + s B A x."""


def load_adapter(module: nn.Module, folder: str | Path) -> None:
    """Give linear layers of ``module`` the low-rank additions of an adapter, in place; they are learned.

    Further weights that the adapter brings, such as those of a classifier, replace the module's own.

    Args:
        module: the model that the adapter was trained for.
        folder: holds adapter_config.json and adapter_model.safetensors.

    Raises:
        ValueError: if a file is missing or unreadable, the adapter is of another kind than plain LoRA, or it does not
            fit the module.
    """
    config, tensors = _read(Path(folder))
    rank, alpha = config["r"], float(config["lora_alpha"])
    # LowRankLinear divides by the rank; with rsLoRA, the scale is alpha / sqrt(r) (Kalajdzievski, 2023, eq. 4).
    scaled = alpha * math.sqrt(rank) if config.get("use_rslora") else alpha
    layers = {name.removesuffix(A) for name in tensors if name.endswith(A)}
    for name in sorted(layers):
        _add(module, name, rank, scaled, tensors, folder)
    own = dict(module.named_parameters())
    for name, value in tensors.items():
        if name.removesuffix(A).removesuffix(B) in layers:
            continue
        if name not in own or own[name].shape != value.shape:
            found = f"it has shape {tuple(own[name].shape)} there" if name in own else "the model has no such weight"
            raise ValueError(f"the adapter in {folder} has {name!r} of shape {tuple(value.shape)}, but {found}")
        own[name].data = value.to(own[name])


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the configuration of an adapter and its tensors, by their names in the model."""
    for file in (CONFIG, WEIGHTS):
        if not (folder / file).is_file():
            raise ValueError(f"the adapter in {folder} lacks {file}")
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        tensors = load_file(folder / WEIGHTS)
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"the adapter in {folder} cannot be read: {error}") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise ValueError(f"{folder / CONFIG} has the peft_type {_get(config, 'peft_type')!r}: only 'LORA' is read")
    for name, plain in PLAIN.items():
        if config.get(name) not in plain:
            raise ValueError(f"{folder / CONFIG} has {name} = {config[name]!r}: only {plain[-1]!r} is read")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not (isinstance(rank, int) and rank >= 1 and isinstance(alpha, int | float)):
        raise ValueError(f"{folder / CONFIG} has r = {rank!r} and lora_alpha = {alpha!r}: both are positive numbers")
    return config, {name.removeprefix(PREFIX): value for name, value in tensors.items()}


def _get(config: Any, name: str) -> Any:
    return config.get(name) if isinstance(config, dict) else None


def _add(
    module: nn.Module, name: str, rank: int, alpha: float, tensors: Mapping[str, Tensor], folder: str | Path
) -> None:
    try:
        layer = module.get_submodule(name)
    except AttributeError:
        raise ValueError(f"the adapter in {folder} is of another model: this one has no layer {name!r}") from None
    if type(layer) is not nn.Linear:
        kind = type(layer).__name__
        raise ValueError(f"the adapter in {folder} is for {name!r}, a {kind}: it must be a linear layer")
    added = LowRankLinear(layer, rank, alpha)
    for suffix, weight in ((A, added.lora_a), (B, added.lora_b)):
        value = tensors.get(name + suffix)
        if value is None or value.shape != weight.shape:
            found = "is missing" if value is None else f"has shape {tuple(value.shape)}"
            raise ValueError(f"the adapter in {folder}: {name}{suffix} {found}; it must be {tuple(weight.shape)}")
        with torch.no_grad():
            weight.copy_(value)
    parent, _, own = name.rpartition(".")
    setattr(module.get_submodule(parent), own, added)


def save_adapter(module: nn.Module, weights: Mapping[str, Tensor], folder: str | Path, base: str = "") -> None:
    """Write the low-rank additions of ``module`` as an adapter that ``peft`` loads.

    Args:
        module: made by ``transformer_from`` or ``lora``. The adapter is one for its ``backbone``, if it has one.
        weights: its learned weights by name, such as those of a leader.
        folder: where the two files are written; it is created.
        base: the name or folder of the base model, for adapter_config.json.

    Raises:
        ValueError: if the module has no low-rank additions, or they differ in rank or scale.
    """
    prefix = "backbone." if isinstance(getattr(module, "backbone", None), nn.Module) else ""
    layers = {n.removeprefix(prefix): part for n, part in module.named_modules() if isinstance(part, LowRankLinear)}
    kinds = {(len(layer.lora_a), layer.scale * len(layer.lora_a)) for layer in layers.values()}
    if len(kinds) != 1:
        raise ValueError(
            "the model has low-rank additions of several ranks or scales: an adapter has one"
            if kinds
            else "the model has no low-rank additions: build it with rank = 4, or with trainers.models:lora"
        )
    ((rank, alpha),) = kinds
    tensors = {
        f"{PREFIX}{name}{suffix}": weights[f"{prefix}{name}.{own}"].detach().cpu().contiguous().clone()
        for name in layers
        for suffix, own in ((A, "lora_a"), (B, "lora_b"))
    }
    config = {
        "base_model_name_or_path": base or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "r": rank,
        "target_modules": sorted(layers),
        "task_type": None,
        "use_dora": False,
        "use_rslora": False,
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
