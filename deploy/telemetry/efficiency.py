"""Sum the learning efficiency over rounds: losses after each prefix of the support set, and support points needed."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from trainers.journal.jsonl import Line

REACHED, POINTS, SCORED = "reached", "points", "rounds"
LOSS, ACCURACY, WITH_ACCURACY = "loss", "accuracy", "judged"

Mean = Callable[[str, str], Any]
"""Returns the mean of a column over the rounds that another column counts.

The result is one value, or one value per bucket; None where no round is counted.
"""
Count = Callable[[str], Any]
"""Returns how many rounds a column counts, one value or one value per bucket."""


class EfficiencySums(NamedTuple):
    """The columns of the learning efficiency in the running sums.

    Attributes:
        learners: names of the learners.
        prefixes: lengths of the support set's prefixes after which learners are scored.
        proficiency: loss or accuracy to reach; None for none.
    """

    learners: Sequence[str]
    prefixes: Sequence[int]
    proficiency: float | None = None

    def columns(self) -> list[str]:
        """Return the names of the columns."""
        return [_column(*key) for name in self.learners for key in self._keys(name)]

    def _keys(self, name: str) -> list[tuple[object, ...]]:
        if not self.prefixes:
            return []
        each = [(name, points, what) for points in self.prefixes for what in (LOSS, ACCURACY, WITH_ACCURACY, SCORED)]
        return [*each, (name, REACHED), (name, POINTS), (name, SCORED)]

    def figures(self, line: Line) -> dict[str, float]:
        """Return the value that a round adds to each column.

        Args:
            line: of the round in ``rounds.jsonl``.
        """
        figures: dict[str, float] = {}
        for name, scores in line.get("efficiency", {}).items():
            if name not in self.learners:
                continue
            needed = scores["points_needed"]
            figures |= {_column(name, SCORED): 1.0, _column(name, REACHED): float(needed is not None)}
            figures[_column(name, POINTS)] = float(needed or 0)
            charge = line["learners"].get(name, {}).get("charged")
            for points, loss, accuracy in scores["prefixes"]:
                counted = charge if loss is None else loss
                if points in self.prefixes and counted is not None:
                    found = {
                        LOSS: counted,
                        ACCURACY: accuracy or 0.0,
                        WITH_ACCURACY: float(accuracy is not None),
                        SCORED: 1.0,
                    }
                    figures |= {_column(name, points, what): value for what, value in found.items()}
        return figures if self.prefixes else {}

    def describe(self) -> dict[str, Any]:
        """Return the prefixes and the proficiency for the regret API; {} if no prefix is scored."""
        if not self.prefixes:
            return {}
        return {"efficiency": {"prefixes": [*self.prefixes], "proficiency": self.proficiency}}

    def means(self, name: str, mean: Mean, count: Count) -> dict[str, Any]:
        """Return a learner's mean loss and accuracy after each prefix and, with a proficiency, how it was reached.

        Args:
            name: of the learner.
            mean: computes the mean of a column.
            count: returns how many rounds a mean is over.
        """
        after = [
            {
                "points": points,
                "loss": mean(_column(name, points, LOSS), _column(name, points, SCORED)),
                "accuracy": mean(_column(name, points, ACCURACY), _column(name, points, WITH_ACCURACY)),
                "rounds": count(_column(name, points, SCORED)),
            }
            for points in self.prefixes
        ]
        if self.proficiency is None:
            return {"prefixes": after}
        return {
            "prefixes": after,
            "reached": mean(_column(name, REACHED), _column(name, SCORED)),
            "mean_points_needed": mean(_column(name, POINTS), _column(name, REACHED)),
            "rounds": count(_column(name, SCORED)),
            "rounds_reached": count(_column(name, REACHED)),
        }

    def summarise(self, name: str, sums: Mapping[str, float]) -> dict[str, Any]:
        """Return a learner's part of the report; {} if no prefix is scored.

        Args:
            name: of the learner.
            sums: of each column over the last 100 rounds.
        """
        if not self.prefixes:
            return {}
        target = {} if self.proficiency is None else {"proficiency": self.proficiency}
        return {
            "learning_efficiency_last_100": {**self.means(name, make_mean(sums), lambda of: int(sums[of])), **target}
        }


def make_mean(sums: Mapping[str, float], unknown: float | None = None) -> Mean:
    """Return a function that computes means from sums of columns over some rounds.

    Args:
        sums: sum of each column.
        unknown: result if no round is counted.
    """
    return lambda what, count: sums[what] / sums[count] if sums[count] else unknown


def _column(*key: object) -> str:
    return " ".join(map(str, ("efficiency", *key)))
