"""Samples of an iterator as rows: (x, y), each a tensor, an array, a number or nested lists of numbers."""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from torch import Tensor

from online_meta.types import Task
from streams.arrivals import Rejected
from streams.header import Array
from streams.row_tasks import encode_row
from streams.rows import Row
from streams.spec import TaskSpec, fits


def read_pairs(items: Iterable[Any], after: int) -> Iterator[Row | None]:
    """Yield what an iterator gives as rows, the first of which is the sample of the number ``after``, and its Nones.

    Raises ``TypeError`` where it gives what is neither a pair nor None.
    """
    for item in items:
        if item is None:
            yield None
            continue
        if not isinstance(item, tuple) or len(item) != 2 or any(isinstance(part, Task) for part in (item, item[1])):
            found = f"the iterator gave {type(item).__name__}; cut by count or change, it must give single samples, "
            raise TypeError(f"{found}(x, y). For whole tasks, leave count and change out")
        yield _row(after, item)
        after += 1


def _row(number: int, pair: tuple[Any, Any]) -> Row:
    try:
        # Copies, for the samples wait until their task ends, and an iterator may write over what it gave.
        x, y = (np.array(value.tolist() if isinstance(value, Tensor) else value) for value in pair)
    except (ValueError, TypeError, OverflowError) as error:
        return Row(number, number + 1, None, b"", str(error)[:200])
    return Row(number, number + 1, {"x": x, "y": y}, b"")


def encode_pair(row: Row, spec: TaskSpec) -> tuple[Array, Array]:
    """Return the sample of a row that ``read_pairs`` gave, and its label or target, in the dtypes of ``spec``.

    Raises:
        Rejected: "unreadable", "wrong_dtype" or "wrong_shape", naming the row by its number, from 0.
    """
    if row.values is not None:
        for what, shape in (("x", spec.x_shape), ("y", spec.y_shape)):
            if not fits(found := row.values[what].shape, shape):
                raise Rejected("wrong_shape", f"the row at {row.begin} has {what} of shape {found}; it must be {shape}")
        row = row._replace(values={what: values.tolist() for what, values in row.values.items()})
    return encode_row(row, ("x",), ("y",), spec)
