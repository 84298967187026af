"""Exact Bayes predictors of sources equal what other ways of computing them give."""

import math
from dataclasses import replace

import numpy as np
import pydantic
import pytest
import scipy.stats
import torch

from online_meta.batches import empty_like
from online_meta.prediction import mean_of, nll_of
from online_meta.types import Batch
from streams.sources import ambiguous_functions, gp_regression, linear_gaussian
from streams.sources.gp_regression import KERNELS

AMBIGUOUS, GP = ambiguous_functions.Settings(), gp_regression.Settings()
LINEAR = linear_gaussian.Settings(
    mean=(0.7, -0.4, 2.0), covariance=((1.5, 0.3, -0.2), (0.3, 0.5, 0.1), (-0.2, 0.1, 0.9)), support=6
)


def numbers(task):
    """Return x and y of support and query as arrays of float64."""
    return tuple(values.double().numpy() for batch in task for values in (batch.x, batch.y[:, 0]))


def nats(predict, task):
    """Return the negative log-likelihood of each query sample."""
    return nll_of(predict(task.support, task.query.x), task.query.y).numpy()


def without_samples(task):
    return task._replace(support=empty_like(task.support))


every_support = pytest.mark.parametrize("change", [lambda task: task, without_samples], ids=["samples", "no samples"])


@pytest.mark.parametrize("t", range(4))
@every_support
def test_a_linear_answer_is_that_of_the_posterior_of_the_coefficients(t, change):
    """The posterior is N(m', S') with S'^-1 = S^-1 + A^T A / s^2 and m' = S' (S^-1 m + A^T y / s^2)."""
    task = change(linear_gaussian.make_task(LINEAR, 5, t))
    x, y, asked, target = numbers(task)
    rows, asked = (np.concatenate([one, np.ones((len(one), 1))], 1) for one in (x, asked))
    prior = np.linalg.inv(LINEAR.covariance)
    covariance = np.linalg.inv(prior + rows.T @ rows / LINEAR.noise**2)
    mean = covariance @ (prior @ np.array(LINEAR.mean) + rows.T @ y / LINEAR.noise**2)
    deviation = np.sqrt(((asked @ covariance) * asked).sum(1) + LINEAR.noise**2)
    expected = -scipy.stats.norm.logpdf(target, asked @ mean, deviation)
    np.testing.assert_allclose(nats(linear_gaussian.oracle(LINEAR), task), expected, rtol=1e-9, atol=1e-9)
    found = mean_of(linear_gaussian.oracle(LINEAR)(task.support, task.query.x))[:, 0]
    np.testing.assert_allclose(found, asked @ mean, rtol=1e-9, atol=1e-9)


def test_coefficients_that_are_known_or_depend_on_each_other_have_an_exact_answer_too():
    known = linear_gaussian.Settings(mean=(2.0, 1.0), covariance=((0.0, 0.0), (0.0, 0.0)))
    task = linear_gaussian.make_task(known, 0, 0)
    x, y = task.query.x.double()[:, 0].numpy(), task.query.y.double()[:, 0].numpy()
    expected = -scipy.stats.norm.logpdf(y, 2 * x + 1, known.noise)
    np.testing.assert_allclose(nats(linear_gaussian.oracle(known), task), expected, rtol=1e-9)


def correlation(kernel, r, settings):
    """Return a kernel at a distance, as the books print it."""
    scale = settings.length_scale
    if kernel == "eq":
        return math.exp(-(r**2) / (2 * scale**2))
    if kernel == "periodic":
        return math.exp(-2 * math.sin(math.pi * r / settings.period) ** 2 / scale**2)
    ratio = math.sqrt(5) * r / scale
    return (1 + ratio + 5 * r**2 / (3 * scale**2)) * math.exp(-ratio)


@pytest.mark.parametrize("kernel", KERNELS)
@every_support
def test_an_answer_of_a_gaussian_process_is_the_ratio_of_joint_densities(kernel, change):
    settings = replace(GP, kernel=kernel, amplitude=1.7, noise=0.2, period=1.3, length_scale=0.8, query=4)
    predict = gp_regression.oracle(settings)
    for t in range(4):
        task = change(gp_regression.make_task(settings, 2, t))
        x, y, asked, target = numbers(task)
        found = nats(predict, task)
        for x_q, y_q, nll in zip(asked, target, found, strict=True):
            points, values = np.append(x, x_q), np.append(y, y_q)
            covariance = np.array([[correlation(kernel, abs(a - b), settings) for a in points] for b in points])
            covariance = settings.amplitude**2 * covariance + settings.noise**2 * np.eye(len(points))
            joint = scipy.stats.multivariate_normal.logpdf(values, cov=covariance)
            seen = scipy.stats.multivariate_normal.logpdf(y, cov=covariance[:-1, :-1]) if len(y) else 0.0
            assert nll == pytest.approx(seen - joint, rel=1e-8, abs=1e-8)


def test_support_sizes_fill_their_range_and_may_be_fixed():
    sizes = {len(gp_regression.make_task(GP, 0, t).support.y) for t in range(100)}
    assert sizes == {*range(3, 11)}
    fixed = replace(GP, least_support=10)
    assert {len(gp_regression.make_task(fixed, 0, t).support.y) for t in range(20)} == {10}


def test_half_of_the_ambiguous_functions_are_lines_and_parameters_fill_their_ranges():
    drawn = [ambiguous_functions.draw_function(np.random.default_rng(t)) for t in range(400)]
    for family in (ambiguous_functions.SINUSOID, ambiguous_functions.LINE):
        own = np.array([parameters for other, parameters in drawn if other is family])
        assert 160 <= len(own) <= 240
        for low, high, values in zip(family.low, family.high, own.T, strict=True):
            assert low <= values.min() < low + 0.1 * (high - low)
            assert high - 0.1 * (high - low) < values.max() <= high


@pytest.mark.parametrize(("noise", "support"), [(0.3, 5), (0.3, 0), (1.0, 12)])
def test_half_the_nodes_of_the_integral_give_the_same_nats(noise, support, monkeypatch):
    settings = replace(AMBIGUOUS, noise=noise, support=support or 5)
    tasks = [ambiguous_functions.make_task(settings, 1, t) for t in range(40)]
    tasks = tasks if support else [without_samples(task) for task in tasks[:10]]
    predict = ambiguous_functions.oracle(settings)
    found = [nats(predict, task) for task in tasks]
    monkeypatch.setattr(ambiguous_functions, "NODES_PER_DEVIATION", ambiguous_functions.NODES_PER_DEVIATION / 2)
    for one, task in zip(found, tasks, strict=True):
        assert np.abs(nats(predict, task) - one).max() < 1e-3


@pytest.mark.parametrize("t", range(3))
def test_an_answer_to_an_ambiguous_function_is_that_of_functions_drawn_from_the_prior(t):
    """Importance sampling: functions from the prior, weighted by their likelihood, within 4.5 standard errors."""
    settings = replace(AMBIGUOUS, noise=1.0, support=3)
    task = ambiguous_functions.make_task(settings, 7, t)
    x, y, asked, target = numbers(task)
    random, draws = np.random.default_rng(t), 200_000
    first, second = random.random((2, draws))
    wave = (0.1 + 4.9 * first)[:, None], (math.pi * second)[:, None]
    line = (6 * first - 3)[:, None], (6 * second - 3)[:, None]

    def values(x):
        x = np.reshape(x, (1, -1))
        return np.concatenate([wave[0] * np.sin(x + wave[1]), line[0] * x + line[1]])

    weights = scipy.stats.norm.pdf(y, values(x), settings.noise).prod(1)
    densities = scipy.stats.norm.pdf(target, values(asked), settings.noise)
    expected = weights @ densities / weights.sum()
    spread = np.sqrt((weights[:, None] ** 2 * (densities - expected) ** 2).sum(0)) / weights.sum()
    found = np.exp(-nats(ambiguous_functions.oracle(settings), task))
    assert (np.abs(found - expected) < 4.5 * spread).all()
    assert (spread < 0.06 * expected).sum() >= 7, "the sampling is fine enough to tell most points"


def test_settings_without_an_exact_answer_are_refused_with_the_reason():
    with pytest.raises(ValueError, match=r"noise = 0.01 with 5 support samples: .* take more noise or fewer samples"):
        ambiguous_functions.oracle(replace(AMBIGUOUS, noise=0.01))
    with pytest.raises(ValueError, match=r"noise is 0.0001: it must be at least 0.001 of the standard deviation"):
        replace(GP, noise=1e-4)
    with pytest.raises(ValueError, match="least_support is 3: it must be at most support, 2"):
        replace(GP, support=2)
    for covariance, message in [
        (((1.0, 0.0),), "must have 2 rows of 2 numbers"),
        (((1.0, 0.5), (0.0, 1.0)), "must be symmetric"),
        (((1.0, 2.0), (2.0, 1.0)), "no negative eigenvalue, but has -1"),
    ]:
        with pytest.raises(ValueError, match=message):
            linear_gaussian.Settings(covariance=covariance)


def test_settings_are_checked_when_they_are_read():
    with pytest.raises(pydantic.ValidationError, match="greater than 0"):
        pydantic.TypeAdapter(gp_regression.Settings).validate_json('{"noise": 0}')
    read = pydantic.TypeAdapter(linear_gaussian.Settings).validate_json(
        '{"mean": [0, 1], "covariance": [[1, 0], [0, 2]]}'
    )
    assert read.covariance == ((1.0, 0.0), (0.0, 2.0))


def test_an_answer_to_many_samples_stays_exact():
    """50 samples in one place: the matrix of the Gaussian process is nearly singular without its noise."""
    x = torch.linspace(0, 0.01, 50, dtype=torch.float64)[:, None]
    found = gp_regression.oracle(replace(GP, noise=0.01))(Batch(x, torch.ones_like(x)), x[:1])
    assert float(nll_of(found, torch.ones(1, 1, dtype=torch.float64))) == pytest.approx(
        math.log(0.01 * math.sqrt(2 * math.pi)), abs=0.05
    )
