"""The classes of a model's output: which dimension holds them, which targets count, how many are right."""

import torch
from torch import Tensor

from online_meta.types import Tensors

IGNORED_CLASS = -100
"""The class of samples and pixels that ``F.cross_entropy`` leaves out."""


def class_dimension(shape: torch.Size, y: Tensor, dim: int | None) -> int:
    """Return the dimension of an output of shape ``shape`` that holds the classes.

    It is ``dim``, or by default that of ``F.cross_entropy``, (n, classes, ...), or the last one, (n, ..., classes),
    where only this fits ``y``. Raises ``ValueError`` if none fits.
    """
    if dim is None and y.shape == shape and y.is_floating_point():
        return min(1, len(shape) - 1)
    choices = [1, len(shape) - 1] if dim is None else [dim % max(len(shape), 1)]
    for choice in choices:
        if choice < len(shape) and (*shape[:choice], *shape[choice + 1 :]) == tuple(y.shape):
            return choice
    if dim is not None and y.shape == shape and y.is_floating_point():
        return dim
    raise ValueError(
        f"the output has shape {tuple(shape)} and y {tuple(y.shape)}: accuracy needs an output (n, classes, ...) and "
        "classes (n, ...)"
    )


def find_right(scores: Tensors, y: Tensors, dim: int | None = None) -> tuple[Tensor, Tensor]:
    """Return which entries are classified correctly, and which count: two boolean tensors (n, ...).

    Args:
        scores: (n, classes, ...); the class with the largest score is the predicted one.
        y: integer classes, of the shape of ``scores`` without the dimension of the classes, or probabilities of the
            whole shape, of which the largest counts. Entries of class -100 do not count.
        dim: the dimension of the classes; None to find it, see ``class_dimension``.

    Returns:
        Right and counted entries. Entries that do not count are not right.

    Raises:
        ValueError: if the shapes do not fit, or for a dict.
    """
    if not (isinstance(scores, Tensor) and isinstance(y, Tensor)):
        raise ValueError("the output or y is a dict: accuracy needs one tensor of each")
    over = class_dimension(scores.shape, y, dim)
    if y.shape == scores.shape:
        y = y.argmax(over)
    counts = y != IGNORED_CLASS
    return scores.argmax(over) == y, counts


def count_entries(y: Tensors) -> Tensor | None:
    """Return the number (n,) of entries of each row of integer classes that count; None for other targets."""
    if not isinstance(y, Tensor) or y.is_floating_point():
        return None
    counted = y != IGNORED_CLASS
    return counted.flatten(1).sum(1) if y.ndim > 1 else counted.long()
