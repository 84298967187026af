"""What a figure was found to be."""

import statistics
from collections.abc import Sequence
from typing import NamedTuple


class Figure(NamedTuple):
    """What was found, as the median of several rounds with the least and the most of them, beside its goal.

    ``least`` says that the goal is to be reached, else it is not to be passed; without a goal it is only told.
    """

    what: str
    found: float
    lowest: float
    highest: float
    goal: float | None = None
    least: bool = False

    @property
    def verdict(self) -> str:
        """Return "met", or by what factor the goal is missed."""
        if self.goal is None:
            return ""
        if self.found >= self.goal if self.least else self.found <= self.goal:
            return "met"
        return f"**missed**: {self.found / self.goal:.2f} times the goal"


def figure(what: str, values: Sequence[float], goal: float | None = None, *, least: bool = False) -> Figure:
    """Return the median of ``values`` and their spread beside the goal."""
    return Figure(what, statistics.median(values), min(values), max(values), goal, least)
