"""Test the contract of every source in ``streams.sources``.

Sources with a ``SPEC`` generate their tasks; those with an ``oracle`` have exact answers to them.
"""

import dataclasses
import inspect
import math
from functools import cache
from itertools import islice

import pytest
import torch

import streams.sources
from online_meta import registry
from online_meta.batches import empty_like, select_samples
from online_meta.prediction import cdf_of, nll_of
from streams.formats.wire import check_id, decode
from streams.spec import Limits
from streams.types import Arrival

KINDS = registry.names(streams.sources)
MAKERS = [kind for kind in KINDS if hasattr(registry.load_module(streams.sources, kind), "SPEC")]

EXACT = [kind for kind in MAKERS if hasattr(registry.load_module(streams.sources, kind), "oracle")]
EXACT_TASKS = 200

every_maker = pytest.mark.parametrize("kind", MAKERS)
every_exact = pytest.mark.parametrize("kind", EXACT)


@cache
def source(kind, seed):
    """Return a source that generates its tasks, cached because creation is slow and reading does not change it."""
    module = registry.load_module(streams.sources, kind)
    return module.create_source(module.Settings(), module.SPEC, "made", seed)


def read(kind, count, after=None, seed=0):
    """Return the first ``count`` arrivals after a position."""
    return list(islice((arrival for arrival in source(kind, seed).read(after) if arrival is not None), count))


def test_there_are_sources_that_make_their_tasks():
    assert MAKERS


@pytest.mark.parametrize("kind", KINDS)
def test_a_source_offers_settings_and_open(kind):
    module = registry.load_module(streams.sources, kind)
    assert dataclasses.is_dataclass(module.Settings)
    assert module.Settings.__dataclass_params__.frozen
    assert list(inspect.signature(module.create_source).parameters) == ["settings", "spec", "name", "seed"]


@every_maker
def test_made_tasks_are_what_the_spec_says(kind):
    module = registry.load_module(streams.sources, kind)
    for arrival in read(kind, 5):
        assert isinstance(arrival, Arrival)
        assert arrival.source == "made"
        check_id(arrival.id, Limits())
        decode(arrival.body, module.SPEC, Limits())


@every_maker
def test_made_tasks_differ_and_have_names_of_their_own(kind):
    arrivals = read(kind, 20)
    assert len({arrival.id for arrival in arrivals}) == 20
    assert len({arrival.body for arrival in arrivals}) == 20


@every_maker
def test_a_stream_goes_on_from_any_position(kind):
    whole = read(kind, 6)
    for place, arrival in enumerate(whole[:-1]):
        assert read(kind, 1, after=arrival.cursor) == [whole[place + 1]]


@every_maker
def test_the_seed_decides_the_stream(kind):
    first = read(kind, 3, seed=1)
    source.cache_clear()
    assert read(kind, 3, seed=1) == first
    assert read(kind, 3, seed=2) != first


@every_maker
def test_a_run_that_expects_other_tasks_is_refused(kind):
    module = registry.load_module(streams.sources, kind)
    other = dataclasses.replace(module.SPEC, x_shape=(*module.SPEC.x_shape, 9))
    with pytest.raises(ValueError, match="x_shape"):
        module.create_source(module.Settings(), other, "made", 0)


def oracle(kind):
    module = registry.load_module(streams.sources, kind)
    return module.oracle(module.Settings())


@cache
def tasks(kind):
    """Return tasks whose query set is one sample, so that they are independent."""
    spec = registry.load_module(streams.sources, kind).SPEC
    made = [decode(arrival.body, spec, Limits()) for arrival in read(kind, EXACT_TASKS)]
    return [task._replace(query=select_samples(task.query, slice(1))) for task in made]


def test_some_sources_have_exact_answers():
    assert EXACT


@every_exact
@pytest.mark.parametrize("samples", ["all", "none"])
def test_intervals_of_an_exact_answer_cover_what_they_say(kind, samples):
    predict, shares = oracle(kind), []
    for task in tasks(kind):
        support = task.support if samples == "all" else empty_like(task.support)
        shares.append(float(cdf_of(predict(support, task.query.x), task.query.y)))
    for level in (0.5, 0.8, 0.9):
        covered = sum(abs(share - 0.5) < level / 2 for share in shares)
        deviation = math.sqrt(EXACT_TASKS * level * (1 - level))
        assert abs(covered - EXACT_TASKS * level) < 4 * deviation, "the binomial distribution allows no more"


@every_exact
def test_an_exact_answer_is_a_density_in_float64_that_the_order_of_samples_does_not_change(kind):
    predict, task = oracle(kind), tasks(kind)[0]
    grid = torch.linspace(-20, 20, 1_001, dtype=torch.float64)[:, None]
    rows = nll_of(predict(task.support, task.query.x.expand(len(grid), -1)), grid)
    assert rows.dtype == torch.float64
    assert float((-rows).exp().sum() * (grid[1] - grid[0])) == pytest.approx(1.0, abs=1e-6)
    turned = task.support._replace(x=task.support.x.flip(0), y=task.support.y.flip(0))
    expected = nll_of(predict(task.support, task.query.x), task.query.y)
    torch.testing.assert_close(nll_of(predict(turned, task.query.x), task.query.y), expected, rtol=1e-9, atol=1e-9)


@every_exact
def test_an_exact_answer_to_a_task_of_another_shape_is_refused(kind):
    predict, task = oracle(kind), tasks(kind)[0]
    with pytest.raises(ValueError, match="x of the query set has shape"):
        predict(task.support, task.query.x.expand(-1, 9))
    with pytest.raises(ValueError, match="weights"):
        predict(task.support._replace(weight=torch.ones(len(task.support.y))), task.query.x)
