"""A measured figure and its goal."""

import statistics
from collections.abc import Sequence
from typing import NamedTuple


class Figure(NamedTuple):
    """The median of several rounds, with their minimum and maximum, and the goal if there is one.

    ``least`` means that the goal is a lower limit; otherwise it is an upper limit.
    """

    what: str
    found: float
    lowest: float
    highest: float
    goal: float | None = None
    least: bool = False

    @property
    def verdict(self) -> str:
        """ "met", or the factor by which the goal is missed; empty without a goal."""
        if self.goal is None:
            return ""
        if self.found >= self.goal if self.least else self.found <= self.goal:
            return "met"
        return f"**missed**: {self.found / self.goal:.2f} times the goal"


def make_figure(what: str, values: Sequence[float], goal: float | None = None, *, least: bool = False) -> Figure:
    """Return the median of ``values`` with their minimum and maximum, and the goal."""
    return Figure(what, statistics.median(values), min(values), max(values), goal, least)
