"""Tasks from any Python iterator, by import path: for notebooks and experiments.

The function is called with the arguments of the configuration and gives an iterator of tasks, or of (id, task); None
means that there is nothing now. The position is the number of tasks that came. A function that takes ``after`` is asked
to begin behind so many; of any other, so many are passed over, so it must give the same tasks each time.
"""

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NamedTuple

from online_meta.import_path import import_by_path
from online_meta.types import Task
from streams.arrivals import Arrival, TaskSource
from streams.spec import TaskSpec
from streams.wire import encode


@dataclass(frozen=True)
class Settings:
    """Options of ``[[source]] kind = "python"``.

    Attributes:
        iterator: "package.module:function", which returns an iterator.
        args: what the function is called with, by name.
    """

    iterator: str
    args: dict[str, Any] = field(default_factory=dict)


def open(settings: Settings, spec: TaskSpec, name: str, seed: int) -> TaskSource | None:
    """Return the stream; raises ``ValueError`` when there is no such function or it does not take the arguments."""
    function = import_by_path(settings.iterator)
    if not callable(function):
        raise ValueError(f"{settings.iterator} is {type(function).__name__} and no function that returns an iterator")
    begin = {"after": 0} if _takes_after(function) else {}
    try:
        inspect.signature(function).bind(**{**begin, **settings.args})
    except TypeError as error:
        raise ValueError(f"{settings.iterator} does not take args = {settings.args}: {error}") from error
    return Iterated(function, settings.args, name)


class Iterated(NamedTuple):
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
        for item in self._behind(count):
            if item is None:
                yield None
                continue
            id, task = (f"{self.name}-{count}", item) if isinstance(item, Task) else _named(item)
            count += 1
            yield Arrival(id, encode(task), self.name, str(count))
        while True:
            yield None

    def _behind(self, count: int) -> Iterator[Any]:
        if _takes_after(self.function) and "after" not in self.args:
            behind: Iterator[Any] = iter(self.function(**self.args, after=count))
            return behind
        items: Iterator[Any] = iter(self.function(**self.args))
        tasks = (item for item in items if item is not None)
        next(islice(tasks, count, count), None)  # passes over the first ones
        return items


def _takes_after(function: Callable[..., Any]) -> bool:
    return "after" in inspect.signature(function).parameters


def _named(item: Any) -> tuple[str, Task]:
    if isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str) and isinstance(item[1], Task):
        return item
    raise TypeError(f"the iterator gave {type(item).__name__}; it must give online_meta.Task or (id, online_meta.Task)")
