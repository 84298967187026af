"""The learners' negative log-likelihoods and calibration over any rounds, from running sums of counts."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

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


class MeasuredCalibration(NamedTuple):
    """How well predictions were calibrated over some rounds; None where nothing was counted.

    Attributes:
        rounds: that count.
        targets: numbers or classes that were predicted in them.
        nll: mean negative log-likelihood of a query row, in nats.
        error: from ``expected_calibration_error``.
        coverage: by level; None for classes.
        sharpness: mean standard deviation of the predictions; None for classes.
    """

    rounds: int
    targets: int
    nll: float | None
    error: float | None
    coverage: dict[float, float | None] | None
    sharpness: float | None


class CalibrationCurves(NamedTuple):
    """The figures of ``MeasuredCalibration`` for several groups of rounds, (groups,); NaN where nothing was counted."""

    nll: NDArray[np.float64]
    error: NDArray[np.float64]
    coverage: dict[float, NDArray[np.float64]] | None
    sharpness: NDArray[np.float64]


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
        return [
            _nll(name),
            _rounds(name),
            _sharpness(name),
            _sharp_rounds(name),
            *(_bin(name, at) for at in range(self.bins)),
        ]

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
                if played.get("sharpness") is not None:
                    figures |= {_sharpness(name): played["sharpness"], _sharp_rounds(name): 1.0}
        return figures

    def summarise(self, name: str, sums: Mapping[str, float]) -> dict[str, Any]:
        """Return a learner's part of the report; {} for an outcome without a distribution.

        Args:
            name: of the learner.
            sums: of each column over the last 100 rounds.
        """
        if not self.bins:
            return {}
        found = self.measure(name, sums)
        summary: dict[str, Any] = {
            "mean_nll_last_100": found.nll,
            "nll_rounds_last_100": found.rounds,
            "calibration_error_last_100": found.error,
        }
        if found.coverage is not None:
            summary["coverage_last_100"] = {f"{level:g}": share for level, share in found.coverage.items()}
            summary["sharpness_last_100"] = found.sharpness
        return summary

    def curves(self, name: str, sums: Mapping[str, NDArray[np.float64]]) -> CalibrationCurves:
        """Return the same figures for each of several groups of rounds.

        Args:
            name: of the learner.
            sums: of each column, (groups,); there are columns.
        """
        counts = np.stack([sums[_bin(name, at)] for at in range(self.bins)])
        coverage: dict[float, NDArray[np.float64]] | None = None
        if self.bins == PIT_BINS:
            total, below = counts.sum(0), counts.cumsum(0)[:-1]
            ends = np.arange(1, PIT_BINS)[:, None] / PIT_BINS
            error = np.abs(_divide(below, total) - ends).mean(0)
            cuts = {level: round((1 - level) / 2 * PIT_BINS) for level in LEVELS}
            coverage = {level: _divide(counts[cut : PIT_BINS - cut].sum(0), total) for level, cut in cuts.items()}
        else:
            samples, correct, confidence = counts.reshape(3, CONFIDENCE_BINS, -1)
            error = _divide(np.abs(correct - confidence).sum(0), samples.sum(0))
        return CalibrationCurves(
            _divide(sums[_nll(name)], sums[_rounds(name)]),
            error,
            coverage,
            _divide(sums[_sharpness(name)], sums[_sharp_rounds(name)]),
        )

    def measure(self, name: str, sums: Mapping[str, float]) -> MeasuredCalibration:
        """Return how well a learner's predictions were calibrated over the rounds of some sums.

        Args:
            name: of the learner.
            sums: of each column over the rounds; there are columns.
        """
        rounds, sharp = int(sums[_rounds(name)]), sums[_sharp_rounds(name)]
        counts = from_numbers([sums[_bin(name, at)] for at in range(self.bins)])
        return MeasuredCalibration(
            rounds,
            int(sum(counts.pit) or sum(counts.samples)),
            sums[_nll(name)] / rounds if rounds else None,
            expected_calibration_error(counts) if rounds else None,
            {level: coverage(counts, level) if rounds else None for level in LEVELS} if counts.pit else None,
            sums[_sharpness(name)] / sharp if sharp else None,
        )


def _divide(sums: NDArray[np.float64], counts: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the mean in each place; NaN where nothing is counted."""
    with np.errstate(invalid="ignore"):
        return np.where(counts > 0, sums, np.nan) / np.where(counts > 0, counts, 1.0)


def count_bins(outcome: Outcome | None) -> int:
    """Return how many counts ``count_calibration`` gives for an outcome; 0 for None."""
    if outcome is None:
        return 0
    return PIT_BINS if outcome.cdf is not None else 3 * CONFIDENCE_BINS if outcome.probabilities is not None else 0


def _nll(name: str) -> str:
    return f"nll {name}"


def _rounds(name: str) -> str:
    return f"nll rounds {name}"


def _sharpness(name: str) -> str:
    return f"sharpness {name}"


def _sharp_rounds(name: str) -> str:
    return f"sharpness rounds {name}"


def _bin(name: str, at: int) -> str:
    return f"calibration {name} {at}"
