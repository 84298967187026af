"""Past tasks in memory, for notebooks and tests."""

from collections.abc import Hashable, Iterable, Sequence

from online_meta.types import Task


class MemoryReplayBuffer:
    """Keeps every task of a stream in a list."""

    def __init__(self) -> None:
        """Begin with no round."""
        self._tasks: list[Task] = []

    def __getitem__(self, round: int, /) -> Task:
        """The task of that round."""
        return self._tasks[round]

    def available(self, count: int) -> Sequence[int]:
        """All of them."""
        return range(count)

    def distribute(self, shares: Sequence[Sequence[int]]) -> None:
        """They are all here."""

    def prefetch(self, reader: Hashable, rounds: Iterable[int]) -> None:
        """They are all here."""

    def add(self, round: int, task: Task) -> None:
        """Keep the task of a round; one that is played again, by a learner that went back, takes the old one's place.

        Raises ``IndexError`` when a round before it is missing.
        """
        if not 0 <= round <= len(self._tasks):
            raise IndexError(f"round {round} comes after round {len(self._tasks)}, which is missing")
        self._tasks[round : round + 1] = [task]
