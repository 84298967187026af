"""The learning efficiency of the stand-in's tasks: its responses where prefixes of the support sets are scored."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

Values = list[float | None]


class EfficiencySettings(NamedTuple):
    """The settings of learning efficiency; ``proficiency`` is an accuracy with ``accuracy``, else a loss."""

    prefixes: tuple[int, ...]
    proficiency: float | None
    accuracy: bool

    def after(self, losses: Sequence[float], points: int) -> Values:
        """Return the losses after ``points`` points: higher for fewer points."""
        return [loss * (1 + 2 / points) for loss in losses]

    def needed(self, losses: Sequence[float]) -> Values:
        """Return the points that each round needed; None where all were too few."""

        def enough(loss: float, points: int) -> bool:
            found, goal = loss * (1 + 2 / points), self.proficiency or 0.0
            return 1 - 0.3 * found >= goal if self.accuracy else found <= goal

        return [next((points for points in self.prefixes if enough(loss, points)), None) for loss in losses]

    def part(self, losses: Sequence[float], means: Callable[[Values], Any]) -> dict[str, Any]:
        """Return a learner's part of a response, with ``means`` over its rounds."""
        needed = self.needed(losses)
        after = [{"points": points, "loss": means(self.after(losses, points))} for points in self.prefixes]
        if self.proficiency is None:
            return {"prefixes": after}
        reached = means([float(points is not None) for points in needed])
        return {"prefixes": after, "reached": reached, "mean_points_needed": means(needed)}


def mean_of_known(values: Values) -> float | None:
    """Return the mean of the known values, or None if there are none."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def bucket_means(values: Values, ends: Sequence[int], first: int) -> Values:
    """Return the mean of each bucket's known values."""
    return [mean_of_known(values[start:end]) for start, end in zip([first, *ends], ends, strict=False)]
