"""Calibration: whether targets occur as often as predictions say, from counts that add up over rounds.

A target with a distribution function F is counted by its probability integral transform F(y), which is uniform on
[0, 1] if the predictions are right (Dawid, 1984). A class is counted by the confidence in the predicted class and by
whether this class was right (Guo et al., ICML 2017). The counts of a window of rounds are the sums of those of its
rounds, exactly, so coverage and calibration error are exact over any window.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from online_meta.functional.classes import class_dimension, find_right
from online_meta.prediction import cdf_of, probabilities_of, to_double
from online_meta.types import Calibration, Prediction, Tensors

PIT_BINS = 20
"""The number of equal bins of [0, 1] in which probability integral transforms are counted."""

CONFIDENCE_BINS = 15
"""The number of equal bins of [0, 1] in which confidences are counted."""

CONFIDENCE_UNIT = 2.0**-20
"""Each confidence is rounded to a multiple of this, so that sums of them in float64 are exact in any order."""


def count_calibration(prediction: Prediction, y: Tensors, weight: Tensor | None = None) -> Calibration | None:
    """Count the targets ``y`` under a prediction; None if its outcomes have no common cdf and no probabilities.

    Every entry of a row counts. Entries of class -100, rows of ``weight`` (n,) 0 and values that are not finite are
    left out. F(y) = u is in bin floor(20 u); a confidence c is in bin ceil(15 c) - 1, so that 1 is in the last one.

    Args:
        prediction: the prediction of y, before y was learned.
        y: the targets.
        weight: rows of weight 0 are padding; None if there are none.

    Returns:
        The counts.

    Raises:
        ValueError: if the shapes do not fit.
    """
    counts = count_in_bins(prediction, y, weight)
    return None if counts is None else from_numbers(counts.tolist())


def count_in_bins(prediction: Prediction, y: Tensors, weight: Tensor | None = None) -> Tensor | None:
    """Return the counts of ``count_calibration`` as a tensor of float64, in the order of ``to_numbers``."""
    with torch.no_grad():
        outcomes = [component.outcome for component in prediction]
        if any(one.cdf is None for one in outcomes) and any(one.probabilities is None for one in outcomes):
            return None
        prediction = to_double(prediction)
        transform = cdf_of(prediction, y)
        if transform is not None:
            kept = _counted(transform, weight)
            return _sum_in_bins((transform * PIT_BINS).floor(), kept, PIT_BINS)
        probabilities = probabilities_of(prediction)
        if probabilities is None:
            return None
        right, counts = find_right(probabilities, y)
        assert isinstance(y, Tensor)
        confidence = probabilities.amax(class_dimension(probabilities.shape, y, None))
        return _count_classes(confidence, right, counts & _counted(confidence, weight))


def _counted(values: Tensor, weight: Tensor | None) -> Tensor:
    """Return which entries of ``values`` (n, ...) are finite and in a row whose weight is not 0."""
    finite = torch.isfinite(values)
    return finite if weight is None else finite & (weight != 0).reshape(-1, *[1] * (values.ndim - 1))


def _sum_in_bins(place: Tensor, kept: Tensor, bins: int, values: Tensor | None = None) -> Tensor:
    """Return the number of kept entries in each bin, or the sum of their values, as float64 on the CPU."""
    # What is left out has a bin of its own: a selection would have a shape that depends on values.
    chosen = torch.where(kept, place.clamp(0, bins - 1), bins).long().reshape(-1).cpu()
    given = None if values is None else torch.where(kept, values, 0).reshape(-1).cpu()
    return torch.bincount(chosen, given, minlength=bins + 1)[:bins].double()


def _count_classes(confidence: Tensor, right: Tensor, kept: Tensor) -> Tensor:
    place = (confidence * CONFIDENCE_BINS).ceil() - 1
    units = (confidence / CONFIDENCE_UNIT).round()  # Sums of integers in float64 are exact.
    samples, correct = (_sum_in_bins(place, entries, CONFIDENCE_BINS) for entries in (kept, kept & right))
    return torch.cat([samples, correct, _sum_in_bins(place, kept, CONFIDENCE_BINS, units) * CONFIDENCE_UNIT])


def add(*calibrations: Calibration) -> Calibration:
    """Return the counts of all rounds of several counts. Raises ``ValueError`` if there are none or kinds differ."""
    if len({(len(one.pit), len(one.samples)) for one in calibrations}) != 1:
        raise ValueError(
            f"{len(calibrations)} counts cannot be added: give at least one, all of cdfs or all of probabilities"
        )
    return Calibration(
        *(tuple(sum(bins) for bins in zip(*field, strict=True)) for field in zip(*calibrations, strict=True))
    )


def coverage(calibration: Calibration, level: float) -> float:
    """Return the share of the targets in the central interval of probability ``level`` of their predictions.

    That is the share with F(y) in [(1 - level) / 2, (1 + level) / 2). It is ``level`` if the predictions are right.

    Args:
        calibration: counts of F(y).
        level: a multiple of 0.1 in (0, 1], because the interval has to end where bins end.

    Returns:
        The share; NaN if nothing was counted.

    Raises:
        ValueError: for another level, or for counts of classes.
    """
    if not 0 < level <= 1 or abs(10 * level - round(10 * level)) > 1e-9:
        raise ValueError(f"level is {level}: the counts tell the coverage of levels 0.1, 0.2, ..., 1.0")
    if calibration.samples:
        raise ValueError("these are counts of classes, which have no intervals: use expected_calibration_error")
    total, cut = sum(calibration.pit), round((1 - level) / 2 * PIT_BINS)
    return sum(calibration.pit[cut : PIT_BINS - cut]) / total if total else math.nan


def expected_calibration_error(calibration: Calibration) -> float:
    """Return how far shares of targets are from their predicted probabilities, in [0, 1]; NaN without counts.

    Of classes, sum_b (n_b / n) |correct_b / n_b - confidence_b / n_b| over bins b of the confidence (Guo et al., ICML
    2017, eq. 3). Of cdfs, the mean of |share of targets with F(y) < u - u| over the 19 inner ends u of the bins.
    """
    if calibration.samples:
        total = sum(calibration.samples)
        gaps = (abs(right - sure) for right, sure in zip(calibration.correct, calibration.confidence, strict=True))
        return sum(gaps) / total if total else math.nan
    total, below, gap = sum(calibration.pit), 0, 0.0
    for end, found in enumerate(calibration.pit[:-1], start=1):
        below += found
        gap += abs(below / total - end / PIT_BINS) if total else math.nan
    return gap / (PIT_BINS - 1) if total else math.nan


def to_numbers(calibration: Calibration) -> list[float]:
    """Return the counts as a list to store, 20 numbers of F(y) or 3 x 15 of classes; lists add up as counts do."""
    return [*calibration.pit, *calibration.samples, *calibration.correct, *calibration.confidence]


def from_numbers(numbers: Sequence[float]) -> Calibration:
    """Return the counts that ``to_numbers`` has listed. Raises ``ValueError`` for a list that is not one of them."""
    if len(numbers) == PIT_BINS:
        return Calibration(pit=tuple(map(int, numbers)))
    if len(numbers) != 3 * CONFIDENCE_BINS:
        raise ValueError(
            f"{len(numbers)} numbers are no counts of calibration: there are {PIT_BINS}, or 3 x {CONFIDENCE_BINS}"
        )
    samples, correct, confidence = (
        numbers[at : at + CONFIDENCE_BINS] for at in range(0, len(numbers), CONFIDENCE_BINS)
    )
    return Calibration((), tuple(map(int, samples)), tuple(map(int, correct)), tuple(map(float, confidence)))
