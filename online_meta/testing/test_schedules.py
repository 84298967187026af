"""What every schedule of ``online_meta.schedules`` keeps."""

import math

import pytest

import online_meta.schedules
from online_meta import registry
from online_meta.schedules.cosine import cosine
from online_meta.schedules.inverse_square_root import inverse_square_root
from online_meta.schedules.linear import linear

SCHEDULES = {name: registry.load(online_meta.schedules, name) for name in registry.names(online_meta.schedules)}
OPTIONS = {"constant": {}}

every_schedule = pytest.mark.parametrize("name", SCHEDULES)


def make(name, **more):
    return SCHEDULES[name](**OPTIONS.get(name, {"rounds": 50}), **more)


@every_schedule
def test_it_begins_at_the_whole_rate_never_rises_and_never_reaches_zero(name):
    shares = [make(name)(round) for round in range(500)]
    assert shares[0] == 1.0
    assert shares == sorted(shares, reverse=True)
    assert 0 < shares[-1] <= 1


@every_schedule
def test_a_warmup_rises_evenly_to_the_whole_rate_and_then_goes_the_same_way(name):
    warm, cold = make(name, warmup=4), make(name)
    assert [warm(round) for round in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert [warm(round + 4) for round in range(200)] == [cold(round) for round in range(200)]


@every_schedule
@pytest.mark.parametrize("wrong", [{"warmup": -1}, {"rounds": 0}, {"rounds": 5, "floor": 1.5}, {"pace": 1}])
def test_what_makes_no_sense_is_refused(name, wrong):
    with pytest.raises((ValueError, TypeError)):
        SCHEDULES[name](**wrong)


def test_factors_equal_their_formulas():
    assert cosine(rounds=10, floor=0.2)(5) == pytest.approx(0.6)
    assert cosine(rounds=10, floor=0.2)(10_000) == pytest.approx(0.2)
    assert linear(rounds=10, floor=0.2)(5) == pytest.approx(0.6)
    assert linear(rounds=10, floor=0.2)(4) == pytest.approx(0.68)
    assert inverse_square_root(rounds=10)(30) == pytest.approx(0.5)
    assert math.isclose(inverse_square_root()(99), 0.1)
