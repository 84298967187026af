"""Pretrained models of the Hugging Face format: frozen, with low-rank additions and a head that are learned."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from streams.formats.text import INSTALL, find_pretrained
from trainers.models.adapters import CONFIG as ADAPTER_CONFIG
from trainers.models.adapters import load_adapter
from trainers.models.lora import add_low_rank, freeze_but

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"

Precision = Literal["bfloat16", "float16", "float32"]
Pooling = Literal["mean", "cls"]
Masking = Literal["bidirectional", "causal", "own"]
"""What a model is given as the mask of its attention: one of 4 dimensions, or its own kind, of 2 dimensions."""


class PretrainedModel(nn.Module):
    """A pretrained ``backbone`` with an optional linear ``head`` on one pooled vector a sample.

    Args:
        backbone: a model of the library ``transformers``.
        head: maps pooled vectors to outputs; None for the vectors themselves.
        pool: "mean" over the positions that are no padding, or "cls", the first position.
        normalize: whether pooled vectors are scaled to length 1.
        output: the field of the backbone's result that is returned as it is, such as "logits"; "" to pool.
    """

    def __init__(
        self, backbone: nn.Module, head: nn.Module | None, pool: Pooling, normalize: bool, output: str = ""
    ) -> None:
        """Find out which mask the backbone takes."""
        super().__init__()
        self.backbone, self.head = backbone, head
        self.pool, self.normalize, self.output = pool, normalize, output
        config: Any = backbone.config
        self.padding: int | None = getattr(config, "pad_token_id", None)
        self.main_input: str = str(getattr(backbone, "main_input_name", "input_ids"))
        self.masking: Masking = "own" if self.main_input != "input_ids" else _find_masking(backbone)

    def forward(self, x: Tensor | None = None, **named: Tensor) -> Tensor:
        """Map token ids (n, length) to outputs (n, outputs), float32 or of a wider dtype of the weights.

        Args:
            x: the main input of the model, for texts int64 token ids. Ids of the padding token are no part of a text.
            named: inputs by their names instead, such as ``input_ids`` and ``attention_mask``.
        """
        if x is not None:
            named = {self.main_input: x, **named}
        mask = named.pop("attention_mask", None)
        if mask is None and self.main_input == "input_ids" and self.padding is not None:
            mask = named["input_ids"] != self.padding
        result = self.backbone(**self._convert(named), **_give_mask(self.masking, mask, _dtype_of(self.backbone)))
        if self.output:
            return _widen(_take(result, self.output))
        pooled = _pool(_widen(result[0]), mask if self.main_input == "input_ids" else None, self.pool)
        if self.normalize:
            pooled = nn.functional.normalize(pooled, dim=-1)
        mapped: Tensor = pooled if self.head is None else self.head(pooled)
        return mapped

    def _convert(self, named: dict[str, Tensor]) -> dict[str, Tensor]:
        dtype = _dtype_of(self.backbone)
        return {name: value.to(dtype) if value.is_floating_point() else value for name, value in named.items()}


def _widen(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _dtype_of(backbone: nn.Module) -> torch.dtype:
    dtype: torch.dtype = next(weight.dtype for weight in backbone.parameters() if weight.is_floating_point())
    return dtype


def _give_mask(masking: Masking, mask: Tensor | None, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the mask (n, length), true where there is a token, as the backbone takes it.

    One of 4 dimensions is added to the attention's logits. With the one of 2 dimensions, a model decides by the values
    of the mask what to compute, which ``vmap`` and programs refuse.
    """
    if mask is None:
        return {}
    if masking == "own":
        return {"attention_mask": mask.to(torch.int64)}
    seen = mask.bool()[:, None, None, :]
    if masking == "causal":
        length = mask.shape[-1]
        seen = seen & torch.ones(length, length, dtype=torch.bool, device=mask.device).tril()
    # The lowest number and not minus infinity: a row of padding alone has no NaN.
    low = torch.full((), torch.finfo(dtype).min, dtype=dtype, device=mask.device)
    return {"attention_mask": torch.where(seen, torch.zeros_like(low), low)}


def _find_masking(backbone: nn.Module) -> Masking:
    """Return the mask of 4 dimensions that gives what the model's own one gives on a small input, or "own"."""
    config: Any = backbone.config
    ids = torch.arange(12).reshape(2, 6) % max(int(getattr(config, "vocab_size", 12)), 1)
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[1, 4:] = False

    def run(masking: Masking) -> Tensor:
        with torch.no_grad():
            first: Tensor = backbone(input_ids=ids, **_give_mask(masking, mask, _dtype_of(backbone)))[0]
        return first.float()[mask] if first.shape[:2] == mask.shape else first.float()

    right = run("own")
    errors: dict[Masking, float] = {}
    for masking in get_args(Masking)[:2]:
        try:
            errors[masking] = float((run(masking) - right).abs().max())
        except Exception:  # Models that take no such mask say so in many ways.
            continue
    best = min(errors, key=errors.__getitem__, default=None)
    return "own" if best is None or errors[best] > 1e-2 * float(right.abs().max()) else best


def _pool(hidden: Tensor, mask: Tensor | None, pool: Pooling) -> Tensor:
    """Return one vector for each sample of (n, length, width)."""
    if pool == "cls":
        return hidden[:, 0]
    if mask is None:
        return hidden.mean(1)
    counts = mask.to(hidden.dtype)[:, :, None]
    return (hidden * counts).sum(1) / counts.sum(1).clamp(min=1)


def _take(result: Any, output: str) -> Tensor:
    found = result.get(output) if hasattr(result, "get") else getattr(result, output, None)
    if not isinstance(found, Tensor):
        known = ", ".join(name for name, value in result.items() if isinstance(value, Tensor))
        raise ValueError(f"the model returns no tensor {output!r}; it returns {known}")
    return found


def transformer_from(
    path_or_import: str,
    *,
    outputs: int = 0,
    output: str = "",
    pool: Pooling = "mean",
    normalize: bool = False,
    precision: Precision = "bfloat16",
    rank: int = 0,
    alpha: float | None = None,
    layers: Sequence[str] = ("*",),
    adapter: str | None = None,
    learned: Sequence[str] = (),
) -> nn.Module:
    """Return a Hugging Face model from this machine, frozen, with a head and low-rank additions that are learned.

    Its names are ``backbone.*``, ``backbone.*.lora_a`` and ``backbone.*.lora_b`` for the additions, and ``head.*``. So
    ``fast = ["head.*"]`` adapts the head, and ``fast = ["*lora*", "head.*"]`` adapts the additions, too. Nothing is
    downloaded, and no code of the folder is run.

    Args:
        path_or_import: a folder with config.json and model.safetensors; the name of an installed package that carries
            one; or an import path "package.module:name" of a path, or of a function that returns one.
        outputs: of a linear head on the pooled vector of a sample; 0 for no head.
        output: instead of a head, the field of the model's own result, such as "logits".
        pool: "mean" over the tokens that are no padding, or "cls", the first token.
        normalize: whether pooled vectors are scaled to length 1.
        precision: of the frozen weights. The head and the low-rank additions are float32.
        rank: of the low-rank additions (LoRA); 0 for none.
        alpha: their scale; by default the rank.
        layers: globs that select the backbone's linear layers by name, such as ("*.query", "*.value").
        adapter: a folder with adapter_config.json and adapter_model.safetensors, as the library ``peft`` writes them:
            low-rank additions to begin with, instead of ``rank``.
        learned: globs of the backbone's own weights to learn nevertheless; this needs ``precision = "float32"``.

    Raises:
        ValueError: if the folder lacks a file or holds another format, or options do not fit.
        ImportError: without the library ``transformers``.
    """
    _check_options(outputs, output, pool, precision, rank, adapter, learned)
    folder = find_pretrained(path_or_import, CONFIG)
    _check_weights(path_or_import, folder)
    backbone = _load_backbone(folder, whole=bool(output), dtype=getattr(torch, precision))
    freeze_but(backbone, learned)
    if adapter is not None:
        load_adapter(backbone, adapter)
    elif rank:
        add_low_rank(backbone, rank, alpha, layers)
    head = None
    if outputs:
        head = nn.Linear(int(backbone.config.hidden_size), outputs)
    return PretrainedModel(backbone.eval(), head, pool, normalize, output)


def _check_options(
    outputs: int,
    output: str,
    pool: str,
    precision: str,
    rank: int,
    adapter: str | None,
    learned: Sequence[str],
) -> None:
    if outputs < 0 or rank < 0:
        raise ValueError(f"outputs is {outputs} and rank {rank}: both are 0 or more")
    if outputs and output:
        raise ValueError(f"outputs is {outputs} and output {output!r}: take a head, or an output of the model itself")
    for name, value, known in (("pool", pool, get_args(Pooling)), ("precision", precision, get_args(Precision))):
        if value not in known:
            raise ValueError(f"{name} is {value!r}: it is one of {', '.join(known)}")
    if rank and adapter is not None:
        raise ValueError(f"rank is {rank} and adapter {adapter!r}: the adapter brings its own rank, so leave rank out")
    if learned and precision != "float32":
        raise ValueError(f"learned weights lose small steps in {precision}: set precision = 'float32'")


def _check_weights(given: str, folder: Path) -> None:
    """Raise ``ValueError`` unless the folder has all weights of a model in safetensors."""
    files = [WEIGHTS]
    if (folder / INDEX).is_file():
        try:
            files = sorted(set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as error:
            raise ValueError(f"{folder / INDEX} is no index of weights: {error!r}") from error
    if (folder / ADAPTER_CONFIG).is_file():  # The library would look for its base model, even in another place.
        raise ValueError(f"{given!r} holds an adapter: name its base model instead, and this folder as adapter")
    lacks = [file for file in files if not (folder / file).is_file()]
    if lacks:
        others = sorted(found.name for found in folder.glob("*.bin"))
        pickled = f"; {', '.join(others)} is pickled, which is never read: convert it to safetensors" if others else ""
        raise ValueError(f"{given!r}: the folder {folder} lacks {', '.join(lacks)}{pickled}")


def _load_backbone(folder: Path, whole: bool, dtype: torch.dtype) -> Any:
    """Return the model: ``whole`` with the head that it was saved with, or without."""
    try:
        import transformers
    except ImportError as error:
        raise ImportError(f"pretrained models need the library transformers: {INSTALL}") from error
    # With these options, files are read from the folder alone, weights are not unpickled, and no code of it is run.
    local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    bars: Any = transformers.utils.logging
    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        config = transformers.AutoConfig.from_pretrained(str(folder), **local)
        named = (getattr(config, "architectures", None) or [""])[0]
        kind = getattr(transformers, named, transformers.AutoModel) if whole else transformers.AutoModel
        backbone = kind.from_pretrained(str(folder), config=config, dtype=dtype, use_safetensors=True, **local)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"the model in {folder} cannot be loaded: {error}") from error
    finally:
        if shown:
            bars.enable_progress_bar()
    return backbone
