"""How uncertain predictions are, against sums over many drawn or listed targets."""

import math

import pytest
import torch

from online_meta.outcomes import bernoulli, categorical, gaussian, gaussian_of_noise, mse, poisson
from online_meta.prediction import cdf_of, mix, nll_of, point, probabilities_of
from online_meta.uncertainty import information_of, quantiles_of, std_of

WEIGHTS = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)


def mix_outputs(outcome, outputs):
    return mix([point(outcome, output) for output in outputs], WEIGHTS.log())


def make_outputs(*shape, scale=1.0):
    return scale * torch.randn(3, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def make_gaussians(n=4):
    return mix_outputs(gaussian.build(), make_outputs(n, 2, scale=2.0))


def list_reals(prediction, rows):
    """Return targets (m, 1) between which all probability lies, and the densities (m, rows) there."""
    grid = torch.linspace(-40, 40, 20_001, dtype=torch.float64)
    return grid, list_densities(prediction, grid, rows)


def list_densities(prediction, values, rows):
    return torch.func.vmap(lambda y: (-nll_of(prediction, y.expand(rows, 1))).exp())(values)


def test_the_standard_deviation_is_that_of_the_whole_mixture():
    prediction = make_gaussians()
    grid, density = list_reals(prediction, 4)
    step = float(grid[1] - grid[0])
    mean = (grid[:, None] * density).sum(0) * step
    expected = ((grid[:, None] - mean) ** 2 * density).sum(0).mul(step).sqrt()
    torch.testing.assert_close(std_of(prediction).flatten(), expected)
    inner = torch.stack([part.outcome.variance(part.outputs[0]) for part in prediction]).flatten(1)
    assert bool((std_of(prediction).flatten() ** 2 > WEIGHTS @ inner + 0.01).all())  # Their means differ, too.


@pytest.mark.parametrize("outcome", [poisson.build(), bernoulli.build()], ids=["counts", "labels"])
def test_counts_and_labels_have_a_standard_deviation(outcome):
    prediction = mix_outputs(outcome, make_outputs(4, 1))
    values = torch.arange(40 if outcome.cdf else 2, dtype=torch.float64)
    share = list_densities(prediction, values, 4)
    mean = (values[:, None] * share).sum(0)
    expected = ((values[:, None] - mean) ** 2 * share).sum(0).sqrt()
    torch.testing.assert_close(std_of(prediction).flatten(), expected)


def test_each_quantile_has_its_share_of_the_mixture_below_it():
    prediction = make_gaussians()
    levels = (0.05, 0.5, 0.95)
    found = quantiles_of(prediction, levels)
    assert found.shape == (3, 4, 1)
    for level, quantile in zip(levels, found, strict=True):
        torch.testing.assert_close(cdf_of(prediction, quantile), torch.full((4, 1), level, dtype=torch.float64))


def test_the_information_of_classes_is_that_of_the_table_of_outputs_and_labels():
    prediction = mix_outputs(categorical.build(), make_outputs(4, 3, scale=3.0))
    joint = torch.stack([w * one[None] for w, one in zip(WEIGHTS, each_probabilities(prediction), strict=True)])
    joint = joint.reshape(3, 4, 3)
    marginal = joint.sum(0)
    expected = (joint * (joint / (WEIGHTS[:, None, None] * marginal)).log()).sum((0, 2))
    torch.testing.assert_close(information_of(prediction), expected)


def each_probabilities(prediction):
    return [part.outcome.probabilities(part.outputs[0]) for part in prediction]


def test_the_information_of_numbers_is_that_of_the_integral():
    prediction = make_gaussians()
    grid, density = list_reals(prediction, 4)
    step = float(grid[1] - grid[0])
    entropy = torch.special.entr(density).sum(0) * step
    for weight, part in zip(WEIGHTS, prediction, strict=True):
        std = part.outcome.variance(part.outputs[0]).sqrt().flatten()
        entropy = entropy - weight * (0.5 * math.log(2 * math.pi * math.e) + std.log())
    found = information_of(prediction)
    torch.testing.assert_close(found, entropy, rtol=0, atol=0.01)
    assert bool((found > 0.02).all())


def test_rows_of_several_numbers_are_told_apart_by_all_of_them():
    far = torch.tensor([-20.0, 20.0, 60.0], dtype=torch.float64)[:, None, None].expand(3, 2, 2)
    prediction = mix_outputs(gaussian_of_noise.build(), far)
    expected = torch.special.entr(WEIGHTS).sum().expand(2)
    torch.testing.assert_close(information_of(prediction), expected, rtol=0, atol=1e-9)  # A label says which is right.


def test_equal_outputs_and_a_single_one_leave_nothing_to_learn():
    one = make_outputs(4, 2)[:1]
    for outputs in (one, one.expand(3, 4, 2)):
        weights = torch.full((len(outputs),), -math.log(len(outputs)), dtype=torch.float64)
        prediction = mix([point(gaussian.build(), output) for output in outputs], weights)
        torch.testing.assert_close(information_of(prediction), torch.zeros(4, dtype=torch.float64))


def test_a_loss_that_is_no_distribution_has_none_of_them():
    prediction = mix_outputs(mse.build(), make_outputs(4, 1))
    assert std_of(prediction) is None
    assert quantiles_of(prediction, (0.5,)) is None
    assert information_of(prediction) is None
    assert probabilities_of(prediction) is None
