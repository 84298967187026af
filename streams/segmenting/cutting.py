"""Cut rows into tasks; the end of a task depends only on its own rows and some that follow, not on earlier rows."""

import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from streams.formats.numbers import unify_key
from streams.formats.rows import EncodeRow, Row, encode_rows, row_bytes
from streams.types import Arrival, Rejected

TASK_BYTES = 64 * 1024 * 1024
"""The largest total length of a task's lines, in bytes; a longer task is cut."""


class Cut(NamedTuple):
    """Decides where tasks end, as pure functions of the rows since the last end, so that restarts change nothing.

    Attributes:
        start: ``start() -> memory`` returns the state at the beginning of a task.
        update: ``update(memory, row) -> (memory, count)`` processes the next row. The first ``count`` rows since the
            start form a task; 0 means that the end is not known yet. The rows after them are processed again from a
            new start. It may raise ``Rejected`` for the first row after a start, which is then no part of a task.
    """

    start: Callable[[], Any]
    update: Callable[[Any, Row], tuple[Any, int]]


class RowSource(NamedTuple):
    """A ``TaskSource`` that cuts rows into tasks.

    Attributes:
        rows: yields the rows after a position, and None while there is no further row.
        encode: returns the sample of a row and its label or target.
        cut: decides where tasks end.
        keep_rest: whether the remaining rows form a task when ``rows`` ends.
        poll_seconds: how long to wait after a None.
        name: the name of the source.
        clock: a monotonic clock in seconds.
        single_row: why a task of one row is refused, which cannot be split; empty if it is not refused here.
    """

    rows: Callable[[int], Iterator[Row | None]]
    encode: EncodeRow
    cut: Cut
    keep_rest: bool
    poll_seconds: float
    name: str
    clock: Callable[[], float] = time.monotonic
    single_row: str = ""

    def read(self, after: str | None) -> Iterator[Arrival | None]:
        """Yield the tasks after a position, None while no further task is complete.

        Raises:
            ValueError: if ``after`` is not a position of this source.
            Exception: whatever reading the rows raises.
        """
        if after is not None and not (after.isascii() and after.isdigit()):
            raise ValueError(f"{self.name}: the position {after!r} is not a number")
        rows: list[Row] = []
        memory = self.cut.start()
        for next_row in self.rows(int(after or 0)):
            if next_row is None:
                yield from self._wait()
                continue
            pending = deque([next_row])
            while pending:
                rows.append(pending.popleft())
                try:
                    memory, count = self.cut.update(memory, rows[-1])
                except Rejected as rejection:
                    yield self._reject(rows, rejection)
                    rows, memory = [], self.cut.start()
                    continue
                if count:
                    yield self._make_arrival(rows[:count])
                    pending.extendleft(reversed(rows[count:]))
                    rows, memory = [], self.cut.start()
        if rows and self.keep_rest:
            yield self._make_arrival(rows)
        while True:
            yield None

    def _wait(self) -> Iterator[None]:
        looked = self.clock()
        yield None
        while self.clock() - looked < self.poll_seconds:
            yield None

    def _make_arrival(self, rows: list[Row]) -> Arrival:
        id, position = f"{self.name}-{rows[0].begin}", str(rows[-1].end)
        try:
            if len(rows) == 1 and self.single_row:
                self.encode(rows[0])
                raise Rejected("empty_query", f"the task of the row at {rows[0].begin} has one row: {self.single_row}")
            return Arrival(id, encode_rows(rows, self.encode), self.name, position)
        except Rejected as rejection:
            return self._reject(rows, rejection)

    def _reject(self, rows: list[Row], rejection: Rejected) -> Arrival:
        id, position = f"{self.name}-{rows[0].begin}", str(rows[-1].end)
        return Arrival(id, b"".join(map(row_bytes, rows)), self.name, position, rejection)


def cut_by_count(count: int) -> Cut:
    """Return a cut that ends a task after every ``count`` rows."""
    return Cut(lambda: 0, lambda rows_seen, row: (rows_seen + 1, count if rows_seen + 1 >= count else 0))


class _KeyState(NamedTuple):
    """The number of rows, the position of the first, and the last key, in a tuple that is empty before the first."""

    rows_seen: int
    begin: int
    key: tuple[Any, ...]


def cut_by_key(key: str, most: int) -> Cut:
    """Return a cut that ends a task where the column ``key`` changes, and after at most ``most`` rows."""

    def update(memory: _KeyState | None, row: Row) -> tuple[_KeyState, int]:
        memory = memory or _KeyState(0, row.begin, ())
        value = memory.key if row.values is None else (unify_key(row.values[key]),)  # an unreadable row keeps the key
        if memory.key and memory.key != value:
            return memory, memory.rows_seen
        memory = _KeyState(memory.rows_seen + 1, memory.begin, value)
        return memory, memory.rows_seen if is_full(memory.rows_seen, memory.begin, row, most) else 0

    return Cut(lambda: None, update)


def is_full(rows_seen: int, begin: int, last: Row, most: int) -> bool:
    """Return whether ``rows_seen`` rows from the position ``begin`` to ``last`` have reached the maximum of a task."""
    return rows_seen >= most or last.end - begin >= TASK_BYTES
