"""Rows, cut into tasks: where a task ends is a function of its rows and of some that follow, and of nothing before."""

import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from streams.formats.rows import EncodeRow, Row, encode_rows, row_bytes
from streams.types import Arrival, Rejected

TASK_BYTES = 64 * 1024 * 1024
"""How long the lines of a task may be together, before it is cut."""


class Cut(NamedTuple):
    """Says where tasks end, as pure functions of the rows since the last end: a restart at any end makes no difference.

    ``start() -> memory`` is that where a task begins;
    ``update(memory, row) -> (memory, count)`` is told of the next row: the first ``count`` of the rows since the start
    are a task, 0 while that is not known. Those behind them are told again, to a new start.
    """

    start: Callable[[], Any]
    update: Callable[[Any, Row], tuple[Any, int]]


class RowSource(NamedTuple):
    """A ``TaskSource`` over rows.

    Attributes:
        rows: gives those behind a position, and None where there is no more now.
        encode: gives a row's sample.
        cut: says where a task ends.
        keep_rest: whether what is left where the rows end is a task.
        poll_seconds: how long to leave them alone after a None.
        name: of the source.
        clock: seconds, never backwards.
    """

    rows: Callable[[int], Iterator[Row | None]]
    encode: EncodeRow
    cut: Cut
    keep_rest: bool
    poll_seconds: float
    name: str
    clock: Callable[[], float] = time.monotonic

    def read(self, after: str | None) -> Iterator[Arrival | None]:
        """Yield the tasks behind a position, None while no more is complete.

        Raises:
            ValueError: if ``after`` is not a position that this source gave.
            Exception: what reading the rows raises.
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
                memory, count = self.cut.update(memory, rows[-1])
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
            return Arrival(id, encode_rows(rows, self.encode), self.name, position)
        except Rejected as rejection:
            return Arrival(id, b"".join(map(row_bytes, rows)), self.name, position, rejection)


def cut_by_count(count: int) -> Cut:
    """Return the cut after every ``count`` rows."""
    return Cut(lambda: 0, lambda rows_seen, row: (rows_seen + 1, count if rows_seen + 1 >= count else 0))


class _KeyState(NamedTuple):
    """How many rows there were, where the first began, and the key of the last that has one, in a tuple."""

    rows_seen: int
    begin: int
    key: tuple[Any, ...]


def cut_by_key(key: str, most: int) -> Cut:
    """Return the cut where the column ``key`` changes, and after ``most`` rows."""

    def update(memory: _KeyState | None, row: Row) -> tuple[_KeyState, int]:
        memory = memory or _KeyState(0, row.begin, ())
        value = memory.key if row.values is None else (row.values[key],)  # what has none belongs where it came in
        if memory.key and memory.key != value:
            return memory, memory.rows_seen
        memory = _KeyState(memory.rows_seen + 1, memory.begin, value)
        return memory, memory.rows_seen if is_full(memory.rows_seen, memory.begin, row, most) else 0

    return Cut(lambda: None, update)


def is_full(rows_seen: int, begin: int, last: Row, most: int) -> bool:
    """Whether so many rows, the first of which begins at ``begin``, are as long as a task may be."""
    return rows_seen >= most or last.end - begin >= TASK_BYTES
