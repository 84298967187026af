"""How fast a count grows, lately."""

import time
from collections import deque
from collections.abc import Callable

WINDOW_SECONDS = 30.0


class RecentRate:
    """The growth of a count per second, over the last half minute."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Begin with nothing noted; ``clock`` gives seconds."""
        self._clock = clock
        self._marks: deque[tuple[float, int]] = deque()

    def record(self, count: int) -> None:
        """Note what the count is now."""
        now = self._clock()
        self._marks.append((now, count))
        while len(self._marks) > 2 and now - self._marks[0][0] > WINDOW_SECONDS:
            self._marks.popleft()

    def per_second(self) -> float:
        """Return the growth per second; 0 before there are two notes."""
        if len(self._marks) < 2:
            return 0.0
        (start_time, first), (now, last) = self._marks[0], self._marks[-1]
        return (last - first) / (now - start_time) if now > start_time else 0.0
