"""Tasks, or samples that are cut into tasks, from any Python iterator, by import path: for notebooks and experiments.

The function is called with the arguments of the configuration and gives an iterator of tasks, or of (id, task); None
means that there is nothing now. By count or change it gives single samples, (x, y), which are cut as rows of a file
are. The position is the number of tasks, or of samples, that came. A function that takes ``after`` is asked to begin
behind so many; of any other, so many are passed over, so it must give the same ones each time.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from online_meta.registry import import_by_path
from online_meta.types import Task
from streams.formats.rows import Row, encode_row
from streams.formats.safetensors_header import Array
from streams.formats.wire import encode
from streams.segmenting.by_leader import NeedsLeader
from streams.segmenting.cutting import Cut, RowSource
from streams.segmenting.options import CutOptions, create_cut_source
from streams.spec import TaskSpec, fits
from streams.types import Arrival, Rejected, TaskSource


class IteratorSource(NamedTuple):
    """A ``TaskSource`` that reads what ``function(**args)`` gives; ids are "<name>-<number>" where it gives none."""

    function: Callable[..., Any]
    args: dict[str, Any]
    name: str

    def read(self, after: str | None) -> Iterator[Arrival | None]:
        """Yield the tasks behind a position, and None for ever when there are no more.

        Raises:
            ValueError: if ``after`` is not a position that this source gave.
            TypeError: if the function gives what is neither a task nor (id, task) nor None.
        """
        if after is not None and not (after.isascii() and after.isdigit()):
            raise ValueError(f"{self.name}: the position {after!r} is not a number of tasks")
        count = int(after or 0)
        for item in items_after(self.function, self.args, count):
            if item is None:
                yield None
                continue
            id, task = (f"{self.name}-{count}", item) if isinstance(item, Task) else _parse_item(item)
            count += 1
            yield Arrival(id, encode(task), self.name, str(count))
        while True:
            yield None


def items_after(function: Callable[..., Any], args: dict[str, Any], count: int) -> Iterator[Any]:
    """Return what ``function(**args)`` gives behind so many that are not None."""
    if accepts_after(function) and "after" not in args:
        items_from_position: Iterator[Any] = iter(function(**args, after=count))
        return items_from_position
    items: Iterator[Any] = iter(function(**args))
    present = (item for item in items if item is not None)
    next(islice(present, count, count), None)  # passes over the first ones
    return items


def accepts_after(function: Callable[..., Any]) -> bool:
    """Whether a function can be asked to begin behind so many."""
    return "after" in inspect.signature(function).parameters


def _parse_item(item: Any) -> tuple[str, Task]:
    if isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str) and isinstance(item[1], Task):
        return item
    right = "it must give online_meta.Task or (id, online_meta.Task); to cut single samples (x, y), set count or change"
    raise TypeError(f"the iterator gave {type(item).__name__}; {right}")


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


@dataclass(frozen=True)
class Settings(CutOptions):
    """Options of ``[[source]] kind = "python"``; without ``count`` and ``change`` it gives whole tasks.

    Attributes:
        iterator: "package.module:function", which returns an iterator.
        args: what the function is called with, by name.
    """

    iterator: str
    args: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse two ways to cut."""
        if self.count is not None and self.change is not None:
            raise ValueError("give one of count (samples a task) and change, or neither: then whole tasks are expected")


def create_source(settings: Settings, spec: TaskSpec, name: str, seed: int) -> TaskSource | NeedsLeader | None:
    """Return the stream; raises ``ValueError`` when there is no such function or it does not take the arguments.

    Raises it, too, for an unknown change, likelihood or option.
    """
    function = import_by_path(settings.iterator)
    if not callable(function):
        raise ValueError(f"{settings.iterator} is {type(function).__name__} and no function that returns an iterator")
    begin = {"after": 0} if accepts_after(function) else {}
    try:
        inspect.signature(function).bind(**{**begin, **settings.args})
    except TypeError as error:
        raise ValueError(f"{settings.iterator} does not take args = {settings.args}: {error}") from error
    if settings.count is None and settings.change is None:
        return IteratorSource(function, settings.args, name)
    encode = partial(encode_pair, spec=spec)

    def read(cut: Cut) -> RowSource:
        def rows(after: int) -> Iterator[Row | None]:
            return read_pairs(items_after(function, settings.args, after), after)

        return RowSource(rows, encode, cut, settings.count is None, 0.0, name)

    return create_cut_source(settings, encode, spec, read)
