"""Tasks, or samples that are cut into tasks, from any Python iterator, by import path: for notebooks and experiments.

The function is called with the arguments of the configuration and gives an iterator of tasks, or of (id, task); None
means that there is nothing now. By count or change it gives single samples, (x, y), which are cut as rows of a file
are. The position is the number of tasks, or of samples, that came. A function that takes ``after`` is asked to begin
behind so many; of any other, so many are passed over, so it must give the same ones each time.
"""

import inspect
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from online_meta.import_path import import_by_path
from streams.arrivals import TaskSource
from streams.leading import NeedsLeader
from streams.rows import Row
from streams.sources._cutting import CutOptions, create_cut_source
from streams.sources._iterated import IteratorSource, accepts_after, items_after
from streams.sources._pairs import encode_pair, read_pairs
from streams.sources._samples import Cut, RowSource
from streams.spec import TaskSpec


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
