"""Sum columns of figures over any interval of rounds, exactly, from the rounds' own values and sums of blocks."""

import math
from array import array
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

BLOCK = 16
"""Rounds in the smallest block; each larger block has 16 blocks of the next smaller size."""


class RunningSum(NamedTuple):
    """A float sum that keeps the rounding errors in a second term (Neumaier, 1974).

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
        """Return the sum as one float."""
        return self.total + self.compensation


class RunningSums(Protocol):
    """Sums of named columns over any interval of rounds.

    The sum over an interval comes from the values in the interval alone: a large value outside changes no bit of it.
    """

    @property
    def columns(self) -> tuple[str, ...]:
        """The names of the columns."""

    def __len__(self) -> int:
        """Return the number of rounds."""

    def append(self, values: Mapping[str, float]) -> None:
        """Add the values of the next round; columns that are not named get 0."""

    def read(self, rounds: Sequence[int]) -> NDArray[np.float64]:
        """Return the sums over the first r rounds for each r of ``rounds``: shape (rounds, columns)."""

    def windows(self, edges: Sequence[int]) -> NDArray[np.float64]:
        """Return the sums over the rounds ``edges[i]`` .. ``edges[i + 1]`` - 1: shape (edges - 1, columns)."""


class RowStore(Protocol):
    """Rows of float64 numbers, one number per column, which are only ever appended."""

    def append_row(self, row: NDArray[np.float64]) -> None:
        """Append a row."""

    def take(self, places: Sequence[int]) -> NDArray[np.float64]:
        """Return the rows at ``places``, counted from 0: shape (places, columns)."""


def count_rows(rounds: int) -> int:
    """Return the number of rows of ``rounds`` rounds.

    Each round has a row of its own values. After the last round of each block of 16, 256, 4096, ... rounds come two
    more rows per block that ends there, smallest block first: the sums over the block, and their rounding errors.
    """
    rows, size = rounds, BLOCK
    while size <= rounds:
        rows, size = rows + 2 * (rounds // size), size * BLOCK
    return rows


def append_round(rows: RowStore, rounds: int, values: NDArray[np.float64]) -> None:
    """Append the row of the next round, and the rows of the blocks that end with it.

    Args:
        rows: of ``rounds`` rounds.
        rounds: the number of rounds so far.
        values: of the round, finite, shape (columns,).
    """
    rows.append_row(values)
    level, part = 1, 1
    while (rounds + 1) % (part * BLOCK) == 0:
        ends = range(rounds + 1 - (BLOCK - 1) * part, rounds + 2, part)
        found = rows.take([place for end in ends for place in _places(end, level - 1)])
        totals = _sum_columns(found)
        rows.append_row(totals)
        rows.append_row(_sum_columns(np.concatenate([found, -totals[None]])))
        level, part = level + 1, part * BLOCK


def sum_windows(rows: RowStore, columns: int, edges: Sequence[int]) -> NDArray[np.float64]:
    """Return the sums over the rounds between each two neighbours of ``edges``, each rounded once from exact sums.

    Args:
        rows: of at least ``max(edges)`` rounds.
        columns: the number of columns.
        edges: numbers of rounds in ascending order.

    Returns:
        Shape (edges - 1, columns).
    """
    places = [_cover(start, end) for start, end in pairwise(edges)]
    sums = np.zeros((len(places), columns))
    found, first = rows.take([place for window in places for place in window]), 0
    for at, window in enumerate(places):
        if window:
            sums[at] = _sum_columns(found[first : first + len(window)])
        first += len(window)
    return sums


def _cover(start: int, end: int) -> list[int]:
    """Return the places of the rows that add up to the rounds ``start`` .. ``end`` - 1, of the largest blocks."""
    places: list[int] = []
    while start < end:
        level, size = 0, 1
        while start % (size * BLOCK) == 0 and start + size * BLOCK <= end:
            level, size = level + 1, size * BLOCK
        start += size
        places += _places(start, level)
    return places


def _places(end: int, level: int) -> tuple[int, ...]:
    """Return the places of the rows of the block of 16^level rounds whose last round is number ``end`` - 1."""
    own = count_rows(end - 1)
    return (own + 2 * level - 1, own + 2 * level) if level else (own,)


def _sum_columns(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.array([math.fsum(column) for column in rows.T.tolist()])


class MemoryRunningSums:
    """``RunningSums`` in memory, with some 9 bytes per round and column."""

    def __init__(self, columns: Iterable[str]) -> None:
        """Start before round 0 with these columns."""
        self.columns = tuple(columns)
        self._rounds = 0
        self._rows = array("d")

    def __len__(self) -> int:
        """Return the number of rounds."""
        return self._rounds

    def append_row(self, row: NDArray[np.float64]) -> None:
        """Append a row of the store."""
        self._rows.extend(row.tolist())

    def take(self, places: Sequence[int]) -> NDArray[np.float64]:
        """Return rows of the store: shape (places, columns)."""
        width = len(self.columns)
        return np.array([self._rows[place * width : (place + 1) * width] for place in places]).reshape(-1, width)

    def append(self, values: Mapping[str, float]) -> None:
        """Add the values of the next round; columns that are not named get 0."""
        append_round(self, self._rounds, order_values(self.columns, values))
        self._rounds += 1

    def read(self, rounds: Sequence[int]) -> NDArray[np.float64]:
        """Return the sums over the first r rounds for each r of ``rounds``: shape (rounds, columns)."""
        return read_sums(self, rounds)

    def windows(self, edges: Sequence[int]) -> NDArray[np.float64]:
        """Return the sums over the rounds ``edges[i]`` .. ``edges[i + 1]`` - 1: shape (edges - 1, columns)."""
        return sum_windows(self, len(self.columns), edges)


def order_values(columns: Sequence[str], values: Mapping[str, float]) -> NDArray[np.float64]:
    """Return the values in the order of the columns; columns that are not named get 0."""
    return np.array([values.get(column, 0.0) for column in columns], dtype=np.float64)


def read_sums(sums: RunningSums, rounds: Sequence[int]) -> NDArray[np.float64]:
    """Return the sums over the first r rounds for each r of ``rounds``: shape (rounds, columns)."""
    return np.array([sums.windows([0, round])[0] for round in rounds]).reshape(-1, len(sums.columns))
