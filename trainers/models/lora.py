"""Low-rank adaptation (LoRA): add low-rank matrices to selected linear layers of a model."""

import math
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from online_meta.registry import import_by_path, nearest

LOW_RANK = "*.lora_[ab]"


class LowRankLinear(nn.Linear):
    """A linear layer with a low-rank addition, W x + b + (alpha / r) B A x (Hu et al., ICLR 2022, eq. 3).

    A has the shape (r, inputs), B the shape (outputs, r). Next to weights in half precision, A and B are float32, so
    that small steps are not lost; x is converted for them, and the sum back.

    Args:
        linear: whose weights W and b are used.
        rank: r.
        alpha: scale.
    """

    def __init__(self, linear: nn.Linear, rank: int, alpha: float) -> None:
        """Draw A like the weights of a linear layer; set B to zero."""
        super().__init__(linear.in_features, linear.out_features, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.scale = alpha / rank
        dtype = torch.promote_types(linear.weight.dtype, torch.float32)
        self.lora_a = nn.Parameter(linear.weight.new_empty(rank, linear.in_features, dtype=dtype))
        self.lora_b = nn.Parameter(linear.weight.new_zeros(linear.out_features, rank, dtype=dtype))
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., inputs) to (..., outputs)."""
        high = super().forward(x)
        low = F.linear(F.linear(x.to(self.lora_a.dtype), self.lora_a), self.lora_b)
        return high + (self.scale * low).to(high.dtype)


def lora(
    build: str,
    *,
    args: dict[str, Any] | None = None,
    rank: int = 4,
    alpha: float | None = None,
    layers: Sequence[str] = ("*",),
    freeze: bool = False,
    learned: Sequence[str] = (),
    weights: str | None = None,
) -> nn.Module:
    """Return a model in which selected linear layers have low-rank additions A and B.

    The names of the other weights do not change. A and B are named ``<layer>.lora_a`` and ``<layer>.lora_b``, so that
    ``fast = ["*lora*"]`` adapts only them.

    Args:
        build: import path of the function that builds the model.
        args: keyword arguments of this function.
        rank: of the additions, 1 or more.
        alpha: scale of the additions; by default the rank.
        layers: globs that select linear layers by name.
        freeze: whether to exclude the model's own weights from learning.
        learned: globs of own weights to learn nevertheless, such as ("head.*",).
        weights: safetensors file with initial weights, as written by ``online-meta export``.

    Raises:
        ValueError: for a rank below 1, a glob without a match, or a file of another model.
    """
    module: nn.Module = import_by_path(build)(**(args or {}))
    if weights is not None:
        _load(module, weights)
    add_low_rank(module, rank, alpha, layers)
    if freeze:
        freeze_but(module, (LOW_RANK, *learned))
    return module


def add_low_rank(module: nn.Module, rank: int, alpha: float | None = None, layers: Sequence[str] = ("*",)) -> None:
    """Give the linear layers of ``module`` that match one of the globs ``layers`` low-rank additions, in place.

    Raises ``ValueError`` for a rank below 1, or a glob without a match.
    """
    if rank < 1:
        raise ValueError(f"rank is {rank}: A and B have rank 1 or more")
    # No subclasses: other modules may use their weights directly, without their forward pass.
    linear = [name for name, layer in module.named_modules() if type(layer) is nn.Linear]
    for name in _matched("layers", layers, linear):
        parent, _, own = name.rpartition(".")
        layer = module.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        setattr(module.get_submodule(parent), own, LowRankLinear(layer, rank, alpha or rank))


def freeze_but(module: nn.Module, learned: Sequence[str]) -> None:
    """Exclude the weights of ``module`` from learning, except those that match one of the globs ``learned``.

    Raises ``ValueError`` for a glob without a match.
    """
    names = [name for name, _ in module.named_parameters()]
    keep = {*_matched("learned", learned, names)}
    for name, weight in module.named_parameters():
        weight.requires_grad_(name in keep)


def _matched(option: str, globs: Sequence[str], names: Sequence[str]) -> list[str]:
    for glob in globs:
        if not any(fnmatchcase(name, glob) for name in names):
            raise ValueError(f"{option} = {glob!r} matches nothing: {nearest(glob, names)}")
    return [name for name in names if any(fnmatchcase(name, glob) for glob in globs)]


def _load(module: nn.Module, file: str) -> None:
    """Load exported weights; ignore those of the inner rule, and keep buffers, which are not exported."""
    try:
        tensors = {name: value for name, value in load_file(file).items() if not name.startswith("rule.")}
        missing, unknown = module.load_state_dict(tensors, strict=False)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise ValueError(f"weights = {file!r}: {error}") from error
    lacks = sorted(set(missing) & {name for name, _ in module.named_parameters()})
    if lacks or unknown:
        raise ValueError(f"weights = {file!r} are of another model: {lacks} are missing, {unknown} are unknown")
