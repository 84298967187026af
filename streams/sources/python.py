"""Tasks from any Python iterator, by import path: for notebooks and experiments.

The function is called with the arguments of the configuration and gives an iterator of tasks, or of (id, task); None
means that there is nothing now. The position is the number of tasks that came. A function that takes ``after`` is asked
to begin behind so many; of any other, so many are passed over, so it must give the same tasks each time.
"""

import inspect
from dataclasses import dataclass, field
from typing import Any

from online_meta.import_path import import_by_path
from streams.arrivals import TaskSource
from streams.sources._iterated import Iterated, takes_after
from streams.spec import TaskSpec


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
    begin = {"after": 0} if takes_after(function) else {}
    try:
        inspect.signature(function).bind(**{**begin, **settings.args})
    except TypeError as error:
        raise ValueError(f"{settings.iterator} does not take args = {settings.args}: {error}") from error
    return Iterated(function, settings.args, name)
