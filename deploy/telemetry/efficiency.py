"""Learning efficiency as sums over rounds: the losses after each prefix of the support sets, and the points needed."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from trainers.journal.jsonl import Line

REACHED, POINTS, SCORED = "reached", "points", "rounds"
LOSS, ACCURACY, WITH_ACCURACY = "loss", "accuracy", "judged"

Mean = Callable[[str, str], Any]
"""The mean of a column over the rounds that another column counts: one, or one a bucket; None where there are none."""


class EfficiencySums(NamedTuple):
    """Which learners are scored after which ``prefixes`` of the support sets, and the ``proficiency`` looked for."""

    learners: Sequence[str]
    prefixes: Sequence[int]
    proficiency: float | None = None

    def columns(self) -> list[str]:
        """Return the names of the sums."""
        return [_column(*key) for name in self.learners for key in self._keys(name)]

    def _keys(self, name: str) -> list[tuple[object, ...]]:
        if not self.prefixes:
            return []
        each = [(name, points, what) for points in self.prefixes for what in (LOSS, ACCURACY, WITH_ACCURACY, SCORED)]
        return [*each, (name, REACHED), (name, POINTS), (name, SCORED)]

    def figures(self, line: Line) -> dict[str, float]:
        """Return what the line of a round adds to the sums."""
        figures: dict[str, float] = {}
        for name, scores in line.get("efficiency", {}).items():
            if name not in self.learners:
                continue
            needed = scores["points_needed"]
            figures |= {_column(name, SCORED): 1.0, _column(name, REACHED): float(needed is not None)}
            figures[_column(name, POINTS)] = float(needed or 0)
            for points, loss, accuracy in scores["prefixes"]:
                if points in self.prefixes and loss is not None:
                    found = {
                        LOSS: loss,
                        ACCURACY: accuracy or 0.0,
                        WITH_ACCURACY: float(accuracy is not None),
                        SCORED: 1.0,
                    }
                    figures |= {_column(name, points, what): value for what, value in found.items()}
        return figures if self.prefixes else {}

    def describe(self) -> dict[str, Any]:
        """Return what is looked at, for the ledger; {} where no prefix is scored."""
        if not self.prefixes:
            return {}
        return {"efficiency": {"prefixes": [*self.prefixes], "proficiency": self.proficiency}}

    def means(self, name: str, mean: Mean) -> dict[str, Any]:
        """Return a learner's means: after each prefix and, where a proficiency is looked for, on the way there."""
        after = [
            {
                "points": points,
                "loss": mean(_column(name, points, LOSS), _column(name, points, SCORED)),
                "accuracy": mean(_column(name, points, ACCURACY), _column(name, points, WITH_ACCURACY)),
            }
            for points in self.prefixes
        ]
        if self.proficiency is None:
            return {"prefixes": after}
        return {
            "prefixes": after,
            "reached": mean(_column(name, REACHED), _column(name, SCORED)),
            "mean_points_needed": mean(_column(name, POINTS), _column(name, REACHED)),
        }

    def summarise(self, name: str, sums: Mapping[str, float]) -> dict[str, Any]:
        """Return a learner's part of the report from its sums over the last 100 rounds; {} where none is scored."""
        if not self.prefixes:
            return {}
        target = {} if self.proficiency is None else {"proficiency": self.proficiency}
        return {"learning_efficiency_last_100": {**self.means(name, make_mean(sums)), **target}}


def make_mean(sums: Mapping[str, float], unknown: float | None = None) -> Mean:
    """Return how to make means of the sums over some rounds; ``unknown`` is that of no rounds."""
    return lambda what, count: sums[what] / sums[count] if sums[count] else unknown


def _column(*key: object) -> str:
    return " ".join(map(str, ("efficiency", *key)))
