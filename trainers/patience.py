"""How long ranks wait for each other, once it is known how long a round takes."""

from collections import deque

ROUNDS_BEFORE = 30
ROUNDS_KEPT = 1000
SLACK_SECONDS = 5.0


class Patience:
    """``limit`` seconds at first, later three times the longest of the last rounds and some slack, never more."""

    def __init__(self, limit: float) -> None:
        """Begin without a round."""
        self._limit = limit
        self._taken: deque[float] = deque(maxlen=ROUNDS_KEPT)

    def note(self, seconds: float) -> None:
        """Take notice of how long a round took."""
        self._taken.append(seconds)

    def due(self) -> bool:
        """Return whether it is time to look at ``seconds`` again."""
        return len(self._taken) >= ROUNDS_BEFORE

    def seconds(self) -> float:
        """Return how long a rank that says nothing is waited for."""
        return min(self._limit, 3 * max(self._taken) + SLACK_SECONDS) if self.due() else self._limit
