"""Calibration from additive counts: right for targets drawn from the predictions, and additive to the bit."""

import itertools
import math

import numpy as np
import pytest
import scipy.stats
import torch

from online_meta import outcomes, registry
from online_meta.prediction import mix, point
from online_meta.regret.calibration import (
    Calibration,
    add,
    count_calibration,
    coverage,
    expected_calibration_error,
    from_numbers,
    to_numbers,
)

DOUBLE = torch.float64
LEVELS = (0.5, 0.8, 0.9)
N = 20_000


def build(name, **options):
    return registry.load(outcomes, name)(**options)


def normal(std=1.0, n=N, claimed=None):
    """Return a prediction of N(mean, claimed^2), and targets with standard deviation ``std``."""
    mean, noise = torch.randn(2, n, 1, dtype=DOUBLE)
    return point(build("gaussian_of_noise", sigma=claimed or std), mean), mean + std * noise


def two_normals():
    """Return a mixture of two families, and targets from it."""
    raw = math.log(math.expm1(2.0 - 1e-3))
    first, second = torch.zeros(N, 1, dtype=DOUBLE), torch.tensor([[3.0, raw]], dtype=DOUBLE).expand(N, 2)
    parts = [point(build("gaussian_of_noise", sigma=0.5), first), point(build("gaussian"), second)]
    from_second = torch.rand(N, 1) < 0.3
    noise = torch.randn(N, 1, dtype=DOUBLE)
    return mix(parts, [math.log(0.7), math.log(0.3)]), torch.where(from_second, 3 + 2 * noise, 0.5 * noise)


def classes(sharper=1.0, n=N):
    """Return a prediction whose logits are ``sharper`` times those of the targets, and the targets."""
    logits = 2 * torch.randn(n, 4, dtype=DOUBLE)
    y = torch.distributions.Categorical(logits=logits).sample()
    return point(build("categorical"), sharper * logits), y


def bounds(level, n=N):
    """Return the shares between which a right interval covers with probability 1 - 2e-6."""
    return scipy.stats.binom.ppf([1e-6, 1 - 1e-6], n, level) / n


@pytest.mark.parametrize("make", [normal, two_normals])
def test_intervals_of_the_true_distribution_cover_what_they_say(make):
    found = count_calibration(*make())
    assert sum(found.pit) == N
    assert found.samples == ()
    for level in LEVELS:
        low, high = bounds(level)
        assert low <= coverage(found, level) <= high
    assert coverage(found, 1.0) == 1.0
    assert expected_calibration_error(found) < 0.02


@pytest.mark.parametrize("claimed", [0.5, 2.0])
def test_a_wrong_scale_is_caught(claimed):
    found = count_calibration(*normal(claimed=claimed))
    for level in LEVELS:
        low, high = bounds(level)
        assert coverage(found, level) < low if claimed < 1 else coverage(found, level) > high
        expected = 2 * scipy.stats.norm.cdf(claimed * scipy.stats.norm.ppf((1 + level) / 2)) - 1
        assert coverage(found, level) == pytest.approx(expected, abs=0.015)
    assert expected_calibration_error(found) > 0.05


def test_coverage_is_the_share_of_targets_in_the_interval():
    prediction, y = normal(n=500, claimed=0.7)
    found = count_calibration(prediction, y)
    z = ((y - prediction[0].outputs[0]) / 0.7).numpy()
    for level in (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9):
        assert coverage(found, level) == np.mean(abs(z) < scipy.stats.norm.ppf((1 + level) / 2))


def test_counts_have_intervals_that_cover_about_what_they_say():
    rate = torch.full((N, 1), 30.0, dtype=DOUBLE)
    found = count_calibration(point(build("poisson"), rate.log()), torch.poisson(rate))
    for level in LEVELS:
        assert coverage(found, level) == pytest.approx(level, abs=0.05)
    over = count_calibration(point(build("poisson"), rate.log()), torch.poisson(rate * torch.rand(N, 1) * 2))
    assert coverage(over, 0.9) < 0.6


def slow_error(prediction, y):
    """Return the expected calibration error of Guo et al. by a loop over bins."""
    p = prediction[0].outputs[0].softmax(1).numpy()
    confidence, right = p.max(1), p.argmax(1) == y.numpy()
    total = 0.0
    for b in range(15):
        inside = (confidence > b / 15) & (confidence <= (b + 1) / 15)
        if inside.any():
            total += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    return total


def test_confidence_in_classes_is_right_for_true_probabilities_and_an_overconfident_model_is_caught():
    right, sharp = classes(), classes(sharper=3.0)
    for prediction, y in (right, sharp):
        found = count_calibration(prediction, y)
        assert sum(found.samples) == N
        assert expected_calibration_error(found) == pytest.approx(slow_error(prediction, y), abs=1e-6)
    assert expected_calibration_error(count_calibration(*right)) < 0.02
    assert expected_calibration_error(count_calibration(*sharp)) > 0.1


def test_confidence_in_labels_counts_each_label():
    logits = 2 * torch.randn(N, 2, dtype=DOUBLE)
    y = torch.bernoulli(logits.sigmoid())
    found = count_calibration(point(build("bernoulli"), logits), y)
    assert sum(found.samples) == 2 * N
    assert expected_calibration_error(found) < 0.02
    assert expected_calibration_error(count_calibration(point(build("bernoulli"), 3 * logits), y)) > 0.1


@pytest.mark.parametrize("make", [normal, classes])
def test_sums_of_windows_are_the_counts_of_the_union_exactly(make):
    prediction, y = make(n=997)
    whole = count_calibration(prediction, y)
    outcome, output = prediction[0].outcome, prediction[0].outputs[0]
    cuts = [0, 1, 2, 100, 555, 997]
    windows = [count_calibration(point(outcome, output[a:b]), y[a:b]) for a, b in itertools.pairwise(cuts)]
    assert add(*windows) == whole
    assert add(add(*windows[3:]), add(*windows[:3])) == whole
    assert from_numbers(to_numbers(whole)) == whole
    numbers = [sum(column) for column in zip(*map(to_numbers, windows), strict=True)]
    assert from_numbers(numbers) == whole
    sums = np.cumsum([to_numbers(one) for one in windows], axis=0)
    assert from_numbers((sums[4] - sums[1]).tolist()) == add(*windows[2:])


def test_padding_ignored_classes_and_values_that_are_not_finite_are_left_out():
    prediction, y = classes(n=50)
    outcome, output = prediction[0].outcome, prediction[0].outputs[0].clone()
    kept = count_calibration(point(outcome, output[3:]), y[3:])
    y[0], output[1] = -100, math.nan
    weight = torch.ones(50)
    weight[2] = 0
    assert count_calibration(point(outcome, output), y, weight) == kept
    prediction, y = normal(n=50)
    fewer = count_calibration(point(prediction[0].outcome, prediction[0].outputs[0][3:]), y[3:])
    y[0] = math.nan
    weight[1] = 0
    assert count_calibration(prediction, y, weight) == fewer


def test_float32_counts_the_bins_of_float64():
    mean = torch.zeros(3, 1)
    y = torch.tensor([[-40.0], [40.0], [0.0]])
    found = count_calibration(point(build("gaussian_of_noise"), mean), y)
    assert found.pit == (1, *[0] * 9, 1, *[0] * 8, 1)
    prediction, y = classes(n=500)
    low = prediction[0].outputs[0].float()
    outcome = build("categorical")
    assert count_calibration(point(outcome, low), y) == count_calibration(point(outcome, low.double()), y)


def test_what_has_neither_a_cdf_nor_probabilities_has_no_counts():
    y = torch.zeros(3, 1)
    assert count_calibration(point(build("mse"), y), y) is None
    mixed = mix([point(build("gaussian"), torch.zeros(3, 2)), point(build("bernoulli"), y)], [0.0, 0.0])
    assert count_calibration(mixed, y) is None


def test_questions_without_an_answer_are_refused():
    continuous, discrete = count_calibration(*normal(n=9)), count_calibration(*classes(n=9))
    for level in (0.0, 0.95, 1.1, math.nan):
        with pytest.raises(ValueError, match="level is"):
            coverage(continuous, level)
    with pytest.raises(ValueError, match="use expected_calibration_error"):
        coverage(discrete, 0.9)
    for several in ((), (continuous, discrete)):
        with pytest.raises(ValueError, match="cannot be added"):
            add(*several)
    with pytest.raises(ValueError, match="19 numbers are no counts"):
        from_numbers([0] * 19)
    none = Calibration(pit=(0,) * 20)
    assert math.isnan(coverage(none, 0.9))
    assert math.isnan(expected_calibration_error(none))
    assert math.isnan(expected_calibration_error(from_numbers([0] * 45)))
