"""Rows without task boundaries, cut into tasks by count or by key: a CSV, JSON-lines, Parquet or Arrow file.

A file of lines may grow; rows are only ever appended. The position is where the last task's last row ended, and a
task's id says where its first row began: after a restart, the same tasks are cut under the same ids. A task's query is
held out of its rows, as of any task that brings none.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

from annotated_types import Ge, Gt, MinLen

from streams.arrivals import Arrival, Rejected, TaskSource
from streams.row_tasks import encode_rows
from streams.rows import Row, read_rows
from streams.spec import TaskSpec

TASK_BYTES = 64 * 1024 * 1024
"""How long the lines of a task may be together, before it is cut."""

Cut = Callable[[list[Row], Row | None], bool]
"""Whether a task of these rows is complete, given the row that follows them, None while none is known.

What finds change points in the stream is one more such function.
"""


@dataclass(frozen=True)
class Settings:
    """Options of ``[[source]] kind = "samples"``; one of ``count`` and ``key`` says where a task ends.

    Attributes:
        path: the file; its ending tells the format: .csv, .jsonl, .parquet, .arrow or .feather.
        x: the columns that make up one sample, in order; or one column of (nested) lists.
        y: the column of the label, or those of the target.
        count: a task has so many rows.
        key: a task ends where the value of this column changes.
        most: by key, a task is cut at so many rows (and at 64 MiB of lines).
        grows: whether lines may still be appended. If not, the rows behind the last change of the key are a task.
        poll_seconds: how often a file that grows is looked at.
    """

    path: str
    x: Annotated[tuple[str, ...], MinLen(1)]
    y: Annotated[tuple[str, ...], MinLen(1)]
    count: Annotated[int, Ge(2)] | None = None
    key: str | None = None
    most: Annotated[int, Ge(2)] = 1_000
    grows: bool = True
    poll_seconds: Annotated[float, Gt(0)] = 0.5

    def __post_init__(self) -> None:
        """Refuse two ways to cut, or none."""
        if (self.count is None) == (self.key is None):
            raise ValueError("give one of count (rows a task) and key (the column whose change ends a task)")


def open(settings: Settings, spec: TaskSpec, name: str, seed: int) -> TaskSource | None:
    """Return the stream of the file's tasks."""
    return Samples(settings, spec, name)


class Samples(NamedTuple):
    """A ``TaskSource`` over a file of rows; ``clock`` gives seconds, never backwards."""

    settings: Settings
    spec: TaskSpec
    name: str
    clock: Callable[[], float] = time.monotonic

    def read(self, after: str | None) -> Iterator[Arrival | None]:
        """Yield the tasks behind a position, None while no more is complete.

        Raises:
            ValueError: if ``after`` is not a position that this source gave, or the file is not what it should be.
            OSError: if the file cannot be read.
        """
        if after is not None and not (after.isascii() and after.isdigit()):
            raise ValueError(f"{self.name}: the position {after!r} is not a number")
        options, cut = self.settings, self._cut()
        columns = list(dict.fromkeys([*options.x, *options.y, *([options.key] if options.key else [])]))
        rows: list[Row] = []
        for row in read_rows(Path(options.path), int(after or 0), columns, options.grows):
            if row is None:
                yield from self._wait()
                continue
            if rows and cut(rows, row):
                yield self._task(rows)
                rows = []
            rows.append(row)
            if cut(rows, None):
                yield self._task(rows)
                rows = []
        if rows and options.key is not None:
            yield self._task(rows)
        while True:
            yield None

    def _wait(self) -> Iterator[None]:
        looked = self.clock()
        yield None
        while self.clock() - looked < self.settings.poll_seconds:
            yield None

    def _cut(self) -> Cut:
        options = self.settings
        return by_count(options.count) if options.count is not None else by_key(options.key or "", options.most)

    def _task(self, rows: list[Row]) -> Arrival:
        id, position = f"{self.name}-{rows[0].begin}", str(rows[-1].end)
        try:
            return Arrival(id, encode_rows(rows, self.settings.x, self.settings.y, self.spec), self.name, position)
        except Rejected as refusal:
            return Arrival(id, b"".join(row.raw for row in rows), self.name, position, refusal)


def by_count(count: int) -> Cut:
    """Return the cut after every ``count`` rows."""
    return lambda rows, following: len(rows) >= count


def by_key(key: str, most: int) -> Cut:
    """Return the cut where the column ``key`` changes, and after ``most`` rows."""

    def cut(rows: list[Row], following: Row | None) -> bool:
        if len(rows) >= most or rows[-1].end - rows[0].begin >= TASK_BYTES:
            return True
        if following is None or following.values is None:
            return False  # what has no key belongs to the task that it came in
        last = next((row.values for row in reversed(rows) if row.values is not None), following.values)
        return bool(last[key] != following.values[key])

    return cut
