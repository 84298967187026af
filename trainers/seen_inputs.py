"""The ranges of the inputs that a run has seen, which mark answers to inputs outside of them."""

import json
from collections.abc import Mapping

import torch
from torch import Tensor

from online_meta.batches import as_named
from online_meta.types import Params, Task, Tensors

SEEN = "seen_inputs"
"""The name under which checkpoints and published leaders have the ranges."""

MOST_FEATURES = 256
"""Vectors of at most this many entries have a range for each entry; other inputs have one for all their entries."""

Ranges = Mapping[str, Tensor]
"""The least and the largest value of each input by its name, (2, features) or (2, 1) in float64."""


class SeenInputs:
    """The ranges of the inputs of all rounds that a run has played."""

    def __init__(self) -> None:
        """Start with nothing seen."""
        self.ranges: dict[str, Tensor] | None = {}

    def add(self, task: Task) -> None:
        """Widen the ranges to the inputs of a task; padding, which has the weight 0, does not count."""
        if self.ranges is None:
            return
        for batch in task:
            for name, x in as_named(batch.x).items():
                found = _find_range(x if batch.weight is None else x[batch.weight > 0])
                if found is not None:
                    known = self.ranges.get(name, found)
                    low, high = torch.minimum(known[0], found[0]), torch.maximum(known[1], found[1])
                    self.ranges[name] = torch.stack([low, high])

    def save(self) -> Params:
        """Return the ranges as a part of a checkpoint."""
        return dict(self.ranges or {})

    def load(self, saved: Params | None) -> None:
        """Restore what ``save`` returned; None, of a checkpoint without ranges, means that they are not known."""
        self.ranges = None if saved is None else {name: value.cpu() for name, value in saved.items()}


def encode_ranges(seen: SeenInputs) -> str:
    """Return the ranges as JSON; "" if none are known."""
    return json.dumps({name: value.tolist() for name, value in seen.ranges.items()}) if seen.ranges else ""


def decode_ranges(text: str) -> Ranges:
    """Return the ranges that ``encode_ranges`` has written."""
    return {name: torch.tensor(one, dtype=torch.float64) for name, one in json.loads(text or "{}").items()}


def find_outside(ranges: Ranges, x: Tensors) -> Tensor:
    """Return which rows have an entry that is less, or larger, than all that were seen, (n,) of bool.

    Args:
        ranges: what was seen; an input without a range is not judged.
        x: the inputs, each (n, ...).
    """
    found = [_is_outside(ranges[name], one) for name, one in as_named(x).items() if name in ranges]
    if not found:
        return torch.zeros(len(next(iter(as_named(x).values()))), dtype=torch.bool)
    return torch.stack(found).any(0)


def _find_range(x: Tensor) -> Tensor | None:
    """Return the least and the largest value of inputs (n, ...): (2, features) or (2, 1); None if there is no order."""
    if not x.numel() or x.is_complex() or x.dtype == torch.bool:
        return None
    if x.ndim <= 2 and x[0].numel() <= MOST_FEATURES:
        low, high = x.amin(0), x.amax(0)
    else:
        low, high = x.amin(), x.amax()
    return torch.stack([low.reshape(-1), high.reshape(-1)]).detach().double().cpu()


def _is_outside(known: Tensor, x: Tensor) -> Tensor:
    rows = (x.flatten(1) if x.ndim > 1 else x[:, None]).detach().cpu()
    return ((rows < known[0]) | (rows > known[1])).any(1)
