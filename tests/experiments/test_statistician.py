"""The table of the neural statistician: a row is made anew on a few rounds, and its figures are as in known cases."""

import math

import numpy as np
import pytest
import scipy.stats
import torch
from online_meta.outcomes import gaussian
from online_meta.outcomes._normal import std_to_scale
from online_meta.prediction import point
from streams.sources.number_sets import FAMILIES, Drawn

from tests.experiments import statistician
from tests.experiments.beliefs import runs
from tests.experiments.beliefs.runs import Contestant
from tests.experiments.statistician import CONTESTANTS, NAME, SHAPES

ROOT3 = math.sqrt(3)
TRUE = {
    "exponential": lambda m, s: scipy.stats.expon(m - s, s),
    "gaussian": scipy.stats.norm,
    "uniform": lambda m, s: scipy.stats.uniform(m - ROOT3 * s, 2 * ROOT3 * s),
    "laplacian": lambda m, s: scipy.stats.laplace(m, s / math.sqrt(2)),
}


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(statistician, "BATCHING", "loop")
    monkeypatch.setattr(runs, "BATCH", 2)
    for name, size in {"FITTED": 12, "TESTED": 12, "COMPARED": 3, "DRAWN": 12, "NODES": 20}.items():
        monkeypatch.setattr(statistician, name, size)


def test_a_row_is_made_anew_and_reused(quick, tmp_path):
    contestant = Contestant("quick", ())
    found = statistician.run(NAME, contestant, 0, 2, tmp_path)
    assert np.shape(found["drawn"]["codes"]) == (12, 32)
    assert found["divergence"] > 0
    saved = next(tmp_path.glob("*.json")).stat().st_mtime_ns
    assert statistician.run(NAME, contestant, 0, 2, tmp_path) == found
    assert next(tmp_path.glob("*.json")).stat().st_mtime_ns == saved
    result = statistician.compose([found])
    assert [figure["seeds"] for figure in result["figures"]] == [1] * 4
    assert "| quick | 1 |" in statistician.render(result)
    assert statistician.draw([found]).startswith(b"\x89PNG")


@pytest.mark.parametrize("name", CONTESTANTS)
def test_the_configuration_of_every_contestant_can_be_read(name):
    assert runs.make_settings(statistician.SOURCE, CONTESTANTS[name], 4).seed == 4


@pytest.mark.parametrize("family", FAMILIES)
def test_densities_and_quantiles_are_those_of_scipy(family):
    right = TRUE[family](0.7, math.sqrt(1.3))
    shares = np.linspace(0.01, 0.99, 25)
    drawn = Drawn(family, 0.7, 1.3)
    quantiles = 0.7 + math.sqrt(1.3) * SHAPES[family].quantile(shares)
    np.testing.assert_allclose(quantiles, right.ppf(shares), rtol=1e-10, atol=1e-10)
    y = np.linspace(-3, 5, 41)
    np.testing.assert_allclose(statistician.log_density_of(drawn, y), right.logpdf(y), rtol=1e-10)
    sums = statistician.sum_log_densities(y[18:23])[list(FAMILIES).index(family)]
    for i, j in ((0, 0), (130, 40), (399, 299)):
        each = TRUE[family](statistician.MEANS[i], math.sqrt(statistician.VARIANCES[j])).logpdf(y[18:23])
        assert sums[i, j] == pytest.approx(each.sum(), rel=1e-9)


def test_the_exact_posterior_knows_large_sets():
    for kind, family in enumerate(FAMILIES):
        numbers = TRUE[family](-0.3, math.sqrt(1.6)).rvs(3000, random_state=np.random.default_rng(kind))
        found = statistician.infer_exactly(numbers)
        assert found.family.argmax() == kind
        assert found.family.sum() == pytest.approx(1)
        assert found.mean == pytest.approx(-0.3, abs=0.1)
        assert found.log_variance == pytest.approx(math.log(1.6), abs=0.15)


class Gaussian:
    """Answers by a Gaussian of a mean and a variance."""

    def __init__(self, mean, variance):
        self.mean, self.std = mean, math.sqrt(variance)

    def state(self):
        return {}

    def answers(self, state, support, x):
        like = torch.ones(len(x), dtype=torch.float64)
        return {"": point(gaussian.build(), {"mean": self.mean * like, "scale": std_to_scale(self.std * like, 1e-3)})}


def test_the_divergence_is_that_of_the_closed_form():
    """KL(N(m, v) || N(n, w)) = (log(w / v) + (v + (m - n)^2) / w - 1) / 2."""
    found = statistician.diverge(Gaussian(0.5, 2.0), None, Drawn("gaussian", -0.2, 1.5))
    assert found == pytest.approx(0.5 * (math.log(2 / 1.5) + (1.5 + 0.49) / 2 - 1), abs=2e-3)
    assert statistician.diverge(Gaussian(-0.2, 1.5), None, Drawn("gaussian", -0.2, 1.5)) == pytest.approx(0, abs=1e-9)
    entropies = {"uniform": math.log(2 * ROOT3), "laplacian": 1 + 0.5 * math.log(2), "exponential": 1}
    for family, entropy in entropies.items():
        right = 0.5 * math.log(2 * math.pi * math.e) - entropy
        assert statistician.diverge_gaussian(family) == pytest.approx(right, abs=2e-3)


def test_linear_codes_are_read_exactly_and_noise_is_not():
    random = np.random.default_rng(0)
    codes, noise = random.standard_normal((40, 3)), random.standard_normal((40, 2))
    targets = codes @ random.standard_normal((3, 2)) + 2
    read = statistician.read_linearly(codes[:20], targets[:20], codes[20:])
    assert statistician.find_determination(read, targets[20:]) == pytest.approx([1, 1])
    read = statistician.read_linearly(codes[:20], noise[:20], codes[20:])
    assert max(statistician.find_determination(read, noise[20:])) < 0.3
    assert statistician.find_determination(np.zeros((2, 1)), np.array([[1.0], [3.0]])) == [-4.0]


def test_the_nearest_centroid_is_that_in_units_of_the_spread():
    """Families differ along the axis in which codes spread little; plain distances would follow the other."""
    random = np.random.default_rng(1)
    families = np.arange(300) % 3
    codes = np.stack([20 * random.standard_normal(300), families + 0.1 * random.standard_normal(300)], 1)
    found = statistician.classify(codes[:200], families[:200], codes[200:])
    assert (found == families[200:]).mean() > 0.95
