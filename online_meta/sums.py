"""Sums over millions of rounds that stay exact, with what they were after each round."""

from array import array
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray


class RunningSum(NamedTuple):
    """A float sum with the rounding errors kept aside (Neumaier 1974).

    Its error is at most 1 ulp, plus n^2 * 2^-106 * sum |x_i| over n terms: 1 ulp over millions of losses of one sign.
    """

    total: float = 0.0
    compensation: float = 0.0

    def plus(self, value: float) -> "RunningSum":
        """Return the sum with ``value`` added."""
        total = self.total + value
        big, small = (self.total, value) if abs(self.total) >= abs(value) else (value, self.total)
        return RunningSum(total, self.compensation + ((big - total) + small))

    def value(self) -> float:
        """The sum."""
        return self.total + self.compensation


class RunningSums(Protocol):
    """Figures of each round by column, summed from round 0 on: what each sum was after any number of rounds is known.

    So a mean over any stretch of rounds is a difference of two rows, whatever its length.
    """

    @property
    def columns(self) -> tuple[str, ...]:
        """The names of the figures."""

    def __len__(self) -> int:
        """How many rounds are summed."""

    def append(self, values: Mapping[str, float]) -> None:
        """Add the figures of the next round; those that are not named are 0."""

    def read(self, rounds: Sequence[int]) -> NDArray[np.float64]:
        """Return the sums over the first so many rounds, for each of ``rounds``: (rounds, columns)."""


class MemoryRunningSums:
    """Sums in memory: 8 bytes a round and column."""

    def __init__(self, columns: Iterable[str]) -> None:
        """Begin before round 0."""
        self.columns = tuple(columns)
        self._running = [RunningSum()] * len(self.columns)
        self._rows = array("d", [0.0] * len(self.columns))

    def __len__(self) -> int:
        """How many rounds are summed."""
        return len(self._rows) // len(self.columns) - 1

    def append(self, values: Mapping[str, float]) -> None:
        """Add the figures of the next round; those that are not named are 0."""
        self._running = add_values(self._running, self.columns, values)
        self._rows.extend(one.value() for one in self._running)

    def read(self, rounds: Sequence[int]) -> NDArray[np.float64]:
        """Return the sums over the first so many rounds, for each of ``rounds``: (rounds, columns)."""
        width = len(self.columns)
        rows = [self._rows[round * width : (round + 1) * width] for round in rounds]
        return np.array(rows).reshape(-1, width)


def add_values(running: Sequence[RunningSum], columns: Sequence[str], values: Mapping[str, float]) -> list[RunningSum]:
    """Return the running sums with the figures of a round added."""
    return [one.plus(values.get(column, 0.0)) for one, column in zip(running, columns, strict=True)]
