"""Rows, cut into tasks: where a task ends is a function of its rows and of the one that follows."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from streams.arrivals import Arrival, Rejected
from streams.row_tasks import encode_rows
from streams.rows import Row, read_rows
from streams.spec import TaskSpec

TASK_BYTES = 64 * 1024 * 1024
"""How long the lines of a task may be together, before it is cut."""

Cut = Callable[[list[Row], Row | None], bool]
"""Whether a task of these rows is complete, given the row that follows them, None while none is known.

What finds change points in the stream is one more such function.
"""


class Samples(NamedTuple):
    """A ``TaskSource`` over a file of rows.

    Attributes:
        path: of the file.
        x: the columns that make up a sample.
        y: the columns of its label or target.
        key: the column that ``cut`` looks at; None if it looks at none, and what is left at the end is no task.
        cut: says where a task ends.
        grows: whether rows may still be appended.
        poll_seconds: how often the file is looked at.
        spec: what a task looks like.
        name: of the source.
        clock: seconds, never backwards.
    """

    path: Path
    x: tuple[str, ...]
    y: tuple[str, ...]
    key: str | None
    cut: Cut
    grows: bool
    poll_seconds: float
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
        columns = list(dict.fromkeys([*self.x, *self.y, *([] if self.key is None else [self.key])]))
        rows: list[Row] = []
        for row in read_rows(self.path, int(after or 0), columns, self.grows):
            if row is None:
                yield from self._wait()
                continue
            if rows and self.cut(rows, row):
                yield self._task(rows)
                rows = []
            rows.append(row)
            if self.cut(rows, None):
                yield self._task(rows)
                rows = []
        if rows and self.key is not None:
            yield self._task(rows)
        while True:
            yield None

    def _wait(self) -> Iterator[None]:
        looked = self.clock()
        yield None
        while self.clock() - looked < self.poll_seconds:
            yield None

    def _task(self, rows: list[Row]) -> Arrival:
        id, position = f"{self.name}-{rows[0].begin}", str(rows[-1].end)
        try:
            return Arrival(id, encode_rows(rows, self.x, self.y, self.spec), self.name, position)
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
