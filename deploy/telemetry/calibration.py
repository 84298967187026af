"""The learners' negative log-likelihoods and calibration over any rounds, from running sums of counts."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from online_meta.regret.calibration import (
    CONFIDENCE_BINS,
    PIT_BINS,
    coverage,
    expected_calibration_error,
    from_numbers,
    to_numbers,
)
from online_meta.types import Calibration, Outcome
from trainers.journal.jsonl import Line

LEVELS = (0.5, 0.8, 0.9)
"""The probabilities of the central intervals whose coverage is reported."""


class CalibrationSums(NamedTuple):
    """The columns of calibration in the running sums.

    Attributes:
        learners: names of the learners.
        bins: numbers of counts of a round: 20 of a cdf, 3 x 15 of class probabilities, 0 for neither.
    """

    learners: Sequence[str]
    bins: int = 0

    def columns(self) -> list[str]:
        """Return the names of the columns."""
        return [column for name in self.learners for column in self._columns(name)] if self.bins else []

    def _columns(self, name: str) -> list[str]:
        return [_nll(name), _rounds(name), *(_bin(name, at) for at in range(self.bins))]

    def figures(self, line: Line) -> dict[str, float]:
        """Return the value that a round adds to each column; a loss that is not finite counts as nothing here.

        Args:
            line: of the round in ``rounds.jsonl``.
        """
        figures: dict[str, float] = {}
        for name in self.learners if self.bins else ():
            played = line["learners"].get(name, {})
            counts = to_numbers(Calibration(**played.get("calibration", {})))
            if played.get("nll") is not None and len(counts) == self.bins:
                figures |= {_nll(name): played["nll"], _rounds(name): 1.0}
                figures |= {_bin(name, at): float(count) for at, count in enumerate(counts)}
        return figures

    def summarise(self, name: str, sums: Mapping[str, float]) -> dict[str, Any]:
        """Return a learner's part of the report; {} for an outcome without a distribution.

        Args:
            name: of the learner.
            sums: of each column over the last 100 rounds.
        """
        if not self.bins:
            return {}
        rounds = sums[_rounds(name)]
        counts = from_numbers([sums[_bin(name, at)] for at in range(self.bins)])
        found: dict[str, Any] = {
            "mean_nll_last_100": sums[_nll(name)] / rounds if rounds else None,
            "nll_rounds_last_100": int(rounds),
            "calibration_error_last_100": expected_calibration_error(counts) if rounds else None,
        }
        if counts.pit:
            covered = {f"{level:g}": coverage(counts, level) if rounds else None for level in LEVELS}
            found["coverage_last_100"] = covered
        return found


def count_bins(outcome: Outcome | None) -> int:
    """Return how many counts ``count_calibration`` gives for an outcome; 0 for None."""
    if outcome is None:
        return 0
    return PIT_BINS if outcome.cdf is not None else 3 * CONFIDENCE_BINS if outcome.probabilities is not None else 0


def _nll(name: str) -> str:
    return f"nll {name}"


def _rounds(name: str) -> str:
    return f"nll rounds {name}"


def _bin(name: str, at: int) -> str:
    return f"calibration {name} {at}"
