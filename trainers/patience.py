"""How long ranks wait for each other, once it is known how long a round takes."""

from collections import deque

TIMEOUT_MIN_ROUNDS = 30
TIMEOUT_MAX_ROUNDS = 1000
TIMEOUT_SLACK_SECONDS = 5.0


class AdaptiveTimeout:
    """``limit`` seconds at first, later three times the longest of the last rounds and some slack, never more."""

    def __init__(self, limit: float) -> None:
        """Begin without a round."""
        self._limit = limit
        self._round_seconds: deque[float] = deque(maxlen=TIMEOUT_MAX_ROUNDS)

    def observe(self, seconds: float) -> None:
        """Take notice of how long a round took."""
        self._round_seconds.append(seconds)

    def is_ready(self) -> bool:
        """Return whether it is time to look at ``seconds`` again."""
        return len(self._round_seconds) >= TIMEOUT_MIN_ROUNDS

    def seconds(self) -> float:
        """Return how long a rank that says nothing is waited for."""
        return (
            min(self._limit, 3 * max(self._round_seconds) + TIMEOUT_SLACK_SECONDS) if self.is_ready() else self._limit
        )
