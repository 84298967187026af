"""How uncertain a prediction is: the spread of its targets, and what a label of a query point would say."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.quasirandom import SobolEngine

from online_meta.batches import map_tensors
from online_meta.outcomes import sum_rows
from online_meta.prediction import mean_of, mix, nll_of, point, probabilities_of, quantile_of, to_double
from online_meta.types import Prediction, Tensors

DRAWS = 256
"""Targets by which the expectations over a continuous distribution are computed."""


def std_of(prediction: Prediction) -> Tensor | None:
    """Return the standard deviation of each target, (n, ...) in float64; None if an outcome has no variance.

    It is that of the whole mixture: Var y = sum_s w_s (Var_s y + (mean_s - mean)^2).
    """
    if any(part.outcome.variance is None for part in prediction):
        return None
    singles, weights = _split(prediction)
    variances = [_variance_of(single) for single in singles]
    means = torch.stack([mean_of(single) for single in singles])
    spread = (means - _average(weights, means)) ** 2
    return _average(weights, torch.stack(variances) + spread).sqrt()


def _variance_of(single: Prediction) -> Tensor:
    variance = single[0].outcome.variance
    assert variance is not None
    return variance(_output_of(single))


def quantiles_of(prediction: Prediction, levels: Sequence[float]) -> Tensor | None:
    """Return the values below which each target lies with probabilities ``levels``, (q, n, ...) in float64.

    None without a ``cdf`` or without levels; see ``quantile_of``.
    """
    found = [quantile_of(prediction, level) for level in levels]
    return torch.stack([one for one in found if one is not None]) if found and None not in found else None


def information_of(prediction: Prediction) -> Tensor | None:
    """Return how informative the label of each row would be, (n,) in float64, in nats, at least 0.

    It is the mutual information of the label and of the output that is right: I = sum_s w_s KL(p_s || sum_r w_r p_r),
    the entropy of the mixture minus the mean entropy of its parts (Houlsby et al., 2011). A prediction of one output
    has no other to tell it from, so that it is 0. Of classes it is exact; a row of several entries has the sum of
    theirs. Of other outcomes, 256 quantiles of each part stand for its targets, and the error is some 0.01 nats; of
    counts the labels between two counts are as probable as these.

    Args:
        prediction: the mixture of all outputs that may be right.

    Returns:
        The information; None if an outcome is no distribution.
    """
    singles, weights = _split(prediction)
    has_classes = probabilities_of(prediction) is not None
    if not has_classes and any(single[0].outcome.cdf is None for single in singles):
        return None
    if len(singles) == 1:
        return torch.zeros(len(mean_of(singles[0])), dtype=torch.float64)
    if has_classes:
        found = [probabilities_of(single) for single in singles]
        each = torch.stack([one for one in found if one is not None])
        entropy = torch.special.entr(each)
        gain = torch.special.entr(_average(weights, each)) - _average(weights, entropy)
        return sum_rows(gain).clamp_min(0)
    return _information_by_quantiles(singles, weights)


def _information_by_quantiles(singles: Sequence[Prediction], weights: Tensor) -> Tensor:
    rows = mean_of(singles[0])
    levels = _spread_levels(rows[0].numel()).reshape(DRAWS, 1, *rows.shape[1:])
    many = [_repeat_rows(single) for single in singles]
    mixture, total = mix(many, weights.log()), torch.zeros(len(rows), dtype=torch.float64)
    for single, weight in zip(many, weights, strict=True):
        y = quantile_of(single, levels.expand(DRAWS, *rows.shape).reshape(-1, *rows.shape[1:]))
        assert y is not None
        gain = nll_of(mixture, y) - nll_of(single, y)
        total = total + weight * gain.reshape(DRAWS, len(rows)).mean(0)
    return total.clamp_min(0)


def _spread_levels(entries: int) -> Tensor:
    """Return probabilities (DRAWS, entries) that fill the unit cube evenly, none of them 0."""
    found: Tensor = SobolEngine(entries).draw(DRAWS, dtype=torch.float64)  # type: ignore[no-untyped-call]
    return found + 0.5 / DRAWS


def _repeat_rows(single: Prediction) -> Prediction:
    """Return the prediction of DRAWS copies of all rows."""
    output = map_tensors(lambda one: one.repeat(DRAWS, *[1] * (one.ndim - 1)), _output_of(single))
    return point(single[0].outcome, output)


def _average(weights: Tensor, each: Tensor) -> Tensor:
    """Return the weighted mean (...) of ``each`` (S, ...)."""
    return torch.einsum("s,s...->...", weights, each)


def _split(prediction: Prediction) -> tuple[list[Prediction], Tensor]:
    """Return the predictions of the single outputs in float64, and their weights."""
    parts = to_double(prediction)
    singles = [
        point(part.outcome, map_tensors(lambda one, s=s: one[s], part.outputs))
        for part in parts
        for s in range(len(part.log_weights))
    ]
    return singles, torch.cat([part.log_weights for part in parts]).exp()


def _output_of(single: Prediction) -> Tensors:
    return map_tensors(lambda one: one[0], single[0].outputs)
