"""The tasks of an iterator that a function gives, from any position."""

import inspect
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, NamedTuple

from online_meta.types import Task
from streams.arrivals import Arrival
from streams.wire import encode


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
