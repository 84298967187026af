"""A source whose task t is a pure function of t, so that its position is just a number."""

import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

from online_meta.types import Task
from streams.arrivals import Arrival
from streams.wire import encode


class SyntheticSource(NamedTuple):
    """A ``TaskSource`` that makes its tasks; the cursor is the number of the last one.

    Attributes:
        make: task t, a pure function.
        name: of the source; ids are "<name>-<t>".
        tasks: how many there are; None: without end.
        per_second: how many at most, counted from when it is read; None: as fast as it is read.
        clock: seconds, never backwards.
    """

    make: Callable[[int], Task]
    name: str
    tasks: int | None = None
    per_second: float | None = None
    clock: Callable[[], float] = time.monotonic

    def read(self, after: str | None) -> Iterator[Arrival | None]:
        """Yield the tasks behind ``after``, None while the next one is not due, and None for ever at the end.

        Raises:
            ValueError: if ``after`` is not a position that this source gave.
        """
        if after is not None and not (after.isascii() and after.isdigit()):
            raise ValueError(f"{self.name}: the position {after!r} is not a task number")
        first = 0 if after is None else int(after) + 1
        began = self.clock()
        t = first
        while True:
            due = self.per_second is None or self.clock() - began >= (t - first) / self.per_second
            if not due or (self.tasks is not None and t >= self.tasks):
                yield None
                continue
            yield Arrival(f"{self.name}-{t}", encode(self.make(t)), self.name, str(t))
            t += 1
