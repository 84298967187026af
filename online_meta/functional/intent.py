"""Declared intent: where a model's gradient differs from its slope on purpose."""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

from torch import nn

from online_meta.registry import nearest


class Intent(NamedTuple):
    """What is declared about a model's gradients, which ``preflight`` then verifies instead of refusing the model.

    Attributes:
        surrogate: globs of layers whose gradient is a surrogate.
        frozen_rows: by name of a weight, rows whose gradient is zero.
        scaled: names of embedding layers with ``scale_grad_by_freq``, whose gradient is a surrogate.
        padding: by name of a weight, the rows ``padding_idx`` of embedding layers.
    """

    surrogate: tuple[str, ...] = ()
    frozen_rows: Mapping[str, tuple[int, ...]] = {}
    scaled: tuple[str, ...] = ()
    padding: Mapping[str, tuple[int, ...]] = {}

    @property
    def surrogates(self) -> tuple[str, ...]:
        """Globs of all layers whose gradient is a surrogate."""
        return (*self.surrogate, *self.scaled)

    @property
    def rows(self) -> dict[str, tuple[int, ...]]:
        """All rows that are constants, by name of a weight."""
        names = dict.fromkeys((*self.frozen_rows, *self.padding))
        return {name: (*self.frozen_rows.get(name, ()), *self.padding.get(name, ())) for name in names}

    def is_surrogate(self, name: str) -> bool:
        """Return whether the layer ``name`` is a surrogate, or a part of one."""
        parts = name.split(".")
        above = [".".join(parts[:count]) for count in range(1, len(parts) + 1)]
        return any(fnmatchcase(one, glob) for one in above for glob in self.surrogates)


def declare_intent(module: nn.Module, surrogate: Sequence[str], frozen_rows: Mapping[str, Sequence[int]]) -> Intent:
    """Return what is declared about the gradients of ``module``, and what its embedding layers declare themselves.

    The row ``padding_idx`` of an embedding is frozen; an embedding with ``scale_grad_by_freq`` has a surrogate
    gradient. Raises ``ValueError`` if a glob matches no layer, or a row or a weight does not exist.
    """
    layers = dict(module.named_modules())
    for glob in surrogate:
        if not any(fnmatchcase(name, glob) for name in layers):
            raise ValueError(f"surrogate = {glob!r} matches none of the model's layers: {nearest(glob, layers)}")
    weights = dict(module.named_parameters(remove_duplicate=False))
    names = {id(weight): name for name, weight in module.named_parameters()}
    rows: dict[str, tuple[int, ...]] = {}
    for name, chosen in frozen_rows.items():
        if name not in weights:
            raise ValueError(f"frozen_rows: {name!r} is none of the model's weights: {nearest(name, weights)}")
        count = len(weights[name]) if weights[name].dim() else 0
        missing = [row for row in chosen if not -count <= row < count]
        if missing:
            raise ValueError(f"frozen_rows: {name} has {count} rows, so there is no row {missing[0]}")
        rows[names[id(weights[name])]] = tuple(row % count for row in chosen)
    scaled, padding = [], {}
    for name, layer in layers.items():
        if isinstance(layer, nn.Embedding) and layer.padding_idx is not None and id(layer.weight) in names:
            padding[names[id(layer.weight)]] = (layer.padding_idx,)
        if isinstance(layer, nn.Embedding | nn.EmbeddingBag) and layer.scale_grad_by_freq:
            scaled.append(name)
    return Intent(tuple(surrogate), rows, tuple(scaled), padding)
