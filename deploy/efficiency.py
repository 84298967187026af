"""Learning efficiency as sums over rounds: the losses after each prefix of the support sets, and the points needed."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from trainers.json_lines import Line

REACHED, POINTS, ASKED = "reached", "points", "rounds"
LOSS, ACCURACY, JUDGED = "loss", "accuracy", "judged"


class Efficiency(NamedTuple):
    """Which learners were scored after which ``prefixes`` of the support sets."""

    learners: Sequence[str]
    prefixes: Sequence[int]

    def columns(self) -> list[str]:
        """Return the names of the sums."""
        return [_column(*key) for name in self.learners for key in self._keys(name)]

    def _keys(self, name: str) -> list[tuple[object, ...]]:
        if not self.prefixes:
            return []
        each = [(name, points, what) for points in self.prefixes for what in (LOSS, ACCURACY, JUDGED, ASKED)]
        return [*each, (name, REACHED), (name, POINTS), (name, ASKED)]

    def figures(self, line: Line) -> dict[str, float]:
        """Return what the line of a round adds to the sums."""
        figures: dict[str, float] = {}
        for name, told in line.get("efficiency", {}).items():
            if name not in self.learners:
                continue
            needed = told["points_needed"]
            figures |= {_column(name, ASKED): 1.0, _column(name, REACHED): float(needed is not None)}
            figures[_column(name, POINTS)] = float(needed or 0)
            for points, loss, accuracy in told["prefixes"]:
                if points in self.prefixes and loss is not None:
                    found = {LOSS: loss, ACCURACY: accuracy or 0.0, JUDGED: float(accuracy is not None), ASKED: 1.0}
                    figures |= {_column(name, points, what): value for what, value in found.items()}
        return figures if self.prefixes else {}

    def summarise(self, name: str, sums: Mapping[str, float], proficiency: float | None) -> dict[str, Any]:
        """Return a learner's part of the report from its sums over some rounds; {} where no prefix was scored."""
        if not self.prefixes:
            return {}

        def mean(what: str, count: str, *key: object) -> float | None:
            many = sums[_column(name, *key, count)]
            return sums[_column(name, *key, what)] / many if many else None

        curve = [
            {"points": points, "loss": mean(LOSS, ASKED, points), "accuracy": mean(ACCURACY, JUDGED, points)}
            for points in self.prefixes
        ]
        reached = {"reached": mean(REACHED, ASKED), "mean_points_needed": mean(POINTS, REACHED)}
        told = {} if proficiency is None else {"proficiency": proficiency, **reached}
        return {"learning_efficiency_last_100": {"prefixes": curve, **told}}


def _column(*key: object) -> str:
    return " ".join(map(str, ("efficiency", *key)))
