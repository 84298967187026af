"""Sets of numbers are drawn from the distributions that the source says."""

import math

import numpy as np
import pydantic
import pytest
import scipy.stats
import torch

from online_meta.replay import generator
from streams.sources import number_sets
from streams.sources.number_sets import FAMILIES, Settings

ROOT3 = math.sqrt(3)
TRUE = {
    "exponential": scipy.stats.expon(-1),
    "gaussian": scipy.stats.norm(),
    "uniform": scipy.stats.uniform(-ROOT3, 2 * ROOT3),
    "laplacian": scipy.stats.laplace(0, math.sqrt(0.5)),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_numbers_of_a_set_follow_its_distribution(family):
    settings = Settings(support=5000, query=1000)
    drawn = {t: number_sets.draw_distribution(generator(3, t)) for t in range(40)}
    found = [t for t, one in drawn.items() if one.family == family]
    assert len(found) >= 3
    for t in found[:3]:
        y = torch.cat([batch.y for batch in number_sets.make_task(settings, 3, t)]).double().numpy()
        standard = (y - drawn[t].mean) / math.sqrt(drawn[t].variance)
        assert scipy.stats.kstest(standard, TRUE[family].cdf).pvalue > 1e-3
        others = [one for name, one in TRUE.items() if name != family]
        assert all(scipy.stats.kstest(standard, one.cdf).pvalue < 1e-3 for one in others)


def test_families_are_equally_common_and_means_and_variances_fill_their_ranges():
    drawn = [number_sets.draw_distribution(generator(0, t)) for t in range(800)]
    counts = [sum(one.family == family for one in drawn) for family in FAMILIES]
    assert all(abs(count - 200) < 4 * math.sqrt(800 * 3 / 16) for count in counts)
    for low, high, values in ((-1, 1, [one.mean for one in drawn]), (0.5, 2, [one.variance for one in drawn])):
        assert scipy.stats.kstest(np.array(values), scipy.stats.uniform(low, high - low).cdf).pvalue > 1e-3


def test_a_task_has_numbers_of_its_own_as_support_and_query():
    task = number_sets.make_task(Settings(support=3, query=4), 1, 2)
    assert (task.support.x.shape, task.query.x.shape) == ((3, 1), (4, 1))
    assert (task.support.y.shape, task.query.y.shape) == ((3,), (4,))
    assert not task.support.x.any()
    assert len({*task.support.y.tolist(), *task.query.y.tolist()}) == 7
    assert number_sets.SPEC.y_shape == ()


@pytest.mark.parametrize("options", [{"support": 0}, {"query": 0}, {"per_second": 0.0}])
def test_options_out_of_range_are_refused(options):
    with pytest.raises(pydantic.ValidationError):
        pydantic.TypeAdapter(Settings).validate_python(options)
