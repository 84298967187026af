"""Rows of numbers -> the body of a task that brings no query."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from safetensors.numpy import save

from streams.arrivals import Rejected
from streams.header import Array
from streams.rows import Row
from streams.spec import TaskSpec, is_dynamic

_MAX_DEPTH = 16

EncodeRow = Callable[[Row], tuple[Array, Array]]
"""Gives the sample of a row and its label or target, or raises ``Rejected``: ``encode_row`` of some columns, say."""


def encode_rows(rows: Sequence[Row], encode: EncodeRow) -> bytes:
    """Return a body with support_x and support_y, a sample a row, of the rows of one task in their order.

    Raises:
        Rejected: what ``encode`` raises, and "wrong_shape" where the rows give samples of several shapes.
    """
    pairs = [encode(row) for row in rows]
    samples, targets = [sample for sample, _ in pairs], [target for _, target in pairs]
    if len({sample.shape for sample in samples}) > 1:
        raise Rejected("wrong_shape", "the rows of a task give samples of several shapes")
    return save({"support_x": np.stack(samples), "support_y": np.stack(targets)})


def encode_row(row: Row, x: Sequence[str], y: Sequence[str], spec: TaskSpec) -> tuple[Array, Array]:
    """Return the sample of a row and its label or target, in their shapes.

    Args:
        row: of which the columns are read.
        x: the columns of a sample, whose numbers, in order, fill its shape; nested lists count with all they hold.
        y: the columns of its label or target.
        spec: what a task looks like. Where a dimension of x is open, x is one column of nested lists of that shape.

    Raises:
        Rejected: "unreadable", "wrong_dtype" or "wrong_shape", naming the row by its position.
    """
    y_dtype = "int64" if spec.y == "class" else "float32"
    return _sample(row, "x", x, spec.x_shape, spec.x_dtype), _sample(row, "y", y, spec.y_shape, y_dtype)


def _sample(row: Row, what: str, columns: Sequence[str], shape: tuple[int, ...], dtype: str) -> Array:
    if row.values is None:
        raise Rejected("unreadable", f"the row at {row.begin} cannot be read: {row.fault}")
    try:
        if is_dynamic(shape):
            shape = np.shape(row.values[columns[0]])
        integral = np.dtype(dtype).kind in "iu"
        numbers = [_number(value, integral) for name in columns for value in _flatten(row.values[name])]
        with np.errstate(over="ignore"):  # what becomes infinite is refused for that
            values = np.array(numbers, dtype)
    except (ValueError, TypeError, OverflowError) as error:
        raise Rejected(
            "wrong_dtype", f"the row at {row.begin} has no {dtype} for {what}: {str(error)[:200]}"
        ) from error
    if len(values) != math.prod(shape):
        found = f"the row at {row.begin} has {len(values)} numbers for {what}"
        raise Rejected("wrong_shape", f"{found}; its shape {shape} takes {math.prod(shape)}")
    return values.reshape(shape)


def _flatten(value: Any, depth: int = 0) -> Iterator[Any]:
    if not isinstance(value, list):
        yield value
    elif depth < _MAX_DEPTH:
        for item in value:
            yield from _flatten(item, depth + 1)
    else:
        raise ValueError(f"lists are nested more than {_MAX_DEPTH} deep")


def _number(value: Any, integral: bool) -> float | int:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(f"{str(value)[:80]!r} is no number")
    number = float(value) if not integral or isinstance(value, float) else int(value)
    if integral and number != int(number):
        raise ValueError(f"{value!r} is no whole number")
    return int(number) if integral else number
