"""Test the contract of every source in ``streams.sources``; sources with a ``SPEC`` generate their tasks."""

import dataclasses
import inspect
from functools import cache
from itertools import islice

import pytest

import streams.sources
from online_meta import registry
from streams.formats.wire import check_id, decode
from streams.spec import Limits
from streams.types import Arrival

KINDS = registry.names(streams.sources)
MAKERS = [kind for kind in KINDS if hasattr(registry.load_module(streams.sources, kind), "SPEC")]

every_maker = pytest.mark.parametrize("kind", MAKERS)


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
