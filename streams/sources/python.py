"""Read tasks, or samples to cut into tasks, from a Python iterator given by import path.

The function is called with the arguments of the configuration. It returns an iterator of tasks, or of pairs (id, task);
None means that there is nothing now. If ``count`` or ``change`` is set, it returns single samples (x, y) instead, which
are cut like the rows of a file. The position is the number of tasks or samples read so far. A function with a parameter
``after`` is called with that number and must start after as many items. For any other function as many items are
skipped, so it must return the same items on each call.
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
    """A ``TaskSource`` over the items of ``function(**args)``; the id of a task without one is "<name>-<number>"."""

    function: Callable[..., Any]
    args: dict[str, Any]
    name: str

    def read(self, after: str | None) -> Iterator[Arrival | None]:
        """Yield the tasks after a position, and only None once there are no more.

        Raises:
            ValueError: if ``after`` is not a position of this source.
            TypeError: if the iterator yields something other than a task, (id, task) or None.
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
            yield _make_arrival(id, task, self.name, str(count))
        while True:
            yield None


def _make_arrival(id: str, task: Task, name: str, cursor: str) -> Arrival:
    """Return the arrival of a task; one that cannot be written as tensors is rejected, and the iterator continues."""
    try:
        return Arrival(id, encode(task), name, cursor)
    except Exception as error:  # A user's own types may raise anything.
        detail = f"item {int(cursor) - 1} is not a task of tensors: {type(error).__name__}: {error}"[:300]
        return Arrival(id, b"", name, cursor, Rejected("unreadable", detail))


def items_after(function: Callable[..., Any], args: dict[str, Any], count: int) -> Iterator[Any]:
    """Return an iterator over the items of ``function(**args)`` after the first ``count`` that are not None."""
    if accepts_after(function) and "after" not in args:
        items_from_position: Iterator[Any] = iter(function(**args, after=count))
        return items_from_position
    items: Iterator[Any] = iter(function(**args))
    present = (item for item in items if item is not None)
    next(islice(present, count, count), None)  # skips the first ``count`` items
    return items


def accepts_after(function: Callable[..., Any]) -> bool:
    """Return whether a function has a parameter ``after``, the number of items to start after."""
    return "after" in inspect.signature(function).parameters


def _parse_item(item: Any) -> tuple[str, Task]:
    if isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str) and isinstance(item[1], Task):
        return item
    right = "it must yield online_meta.Task or (id, online_meta.Task); to cut samples (x, y), set count or change"
    raise TypeError(f"the iterator yielded {type(item).__name__}; {right}")


def read_pairs(items: Iterable[Any], after: int) -> Iterator[Row | None]:
    """Yield the samples of an iterator as rows, and None for each None.

    Args:
        items: an iterable of pairs (x, y) and None.
        after: the number of the first sample.

    Raises:
        TypeError: if an item is neither a pair nor None.
    """
    for item in items:
        if item is None:
            yield None
            continue
        if not isinstance(item, tuple) or len(item) != 2 or any(isinstance(part, Task) for part in (item, item[1])):
            found = f"the iterator yielded {type(item).__name__}; with count or change it must yield single samples "
            raise TypeError(f"{found}(x, y). For whole tasks, omit count and change")
        yield _row(after, item)
        after += 1


def _row(number: int, pair: tuple[Any, Any]) -> Row:
    try:
        # Copy the values: samples wait until their task ends, and an iterator may reuse its buffers.
        x, y = (np.array(value.tolist() if isinstance(value, Tensor) else value) for value in pair)
        for values in (x, y):
            if values.dtype.kind in "mM":  # tolist() would return numbers of nanoseconds
                raise ValueError(f"a sample has values of type {values.dtype}, which are not numbers")
    except Exception as error:  # conversions of a user's own types may raise anything
        return Row(number, number + 1, None, b"", f"{type(error).__name__}: {error}"[:200])
    return Row(number, number + 1, {"x": x, "y": y}, b"")


def encode_pair(row: Row, spec: TaskSpec) -> tuple[Array, Array]:
    """Return the sample of a row from ``read_pairs`` and its label or target, in the shapes and dtypes of ``spec``.

    Raises:
        Rejected: with the reason "unreadable", "wrong_dtype" or "wrong_shape"; the detail names the row's number.
    """
    if row.values is not None:
        for what, shape in (("x", spec.require_single_input("a source of pairs")), ("y", spec.y_shape)):
            if not fits(found := row.values[what].shape, shape):
                raise Rejected("wrong_shape", f"the row at {row.begin} has {what} of shape {found}; it must be {shape}")
        row = row._replace(values={what: values.tolist() for what, values in row.values.items()})
    return encode_row(row, ("x",), ("y",), spec)


@dataclass(frozen=True)
class Settings(CutOptions):
    """Options of ``[[source]] kind = "python"``; without ``count`` and ``change`` the iterator yields whole tasks.

    Attributes:
        iterator: "package.module:function", a function that returns an iterator.
        args: the keyword arguments of the function.
    """

    iterator: str
    args: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raise ``ValueError`` if both ``count`` and ``change`` are set."""
        if self.count is not None and self.change is not None:
            raise ValueError("set count (samples per task) or change, not both; without either, whole tasks are read")


def create_source(settings: Settings, spec: TaskSpec, name: str, seed: int) -> TaskSource | NeedsLeader | None:
    """Return the stream of the iterator's tasks.

    Raises:
        ValueError: if there is no such function, it does not accept the arguments, or a change, likelihood or option is
            unknown.
    """
    function = import_by_path(settings.iterator)
    if not callable(function):
        raise ValueError(f"{settings.iterator} is {type(function).__name__}, not a function that returns an iterator")
    begin = {"after": 0} if accepts_after(function) else {}
    try:
        inspect.signature(function).bind(**{**begin, **settings.args})
    except TypeError as error:
        raise ValueError(f"{settings.iterator} does not accept args = {settings.args}: {error}") from error
    if settings.count is None and settings.change is None:
        return IteratorSource(function, settings.args, name)
    encode = partial(encode_pair, spec=spec)

    def read(cut: Cut) -> RowSource:
        def rows(after: int) -> Iterator[Row | None]:
            return read_pairs(items_after(function, settings.args, after), after)

        return RowSource(rows, encode, cut, settings.count is None, 0.0, name)

    return create_cut_source(settings, encode, spec, read)
