"""Races: the best is dropped as rarely as promised, and those that are behind are dropped in time."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from online_meta.regret.racing import drop, find_best, find_losers, observe, start_race

NAMES = ("a", "b", "c", "d")
DEVIATION = 1.0


def run_race(losses, alpha, names=NAMES, every=10):
    """Return the race after the rows of losses, and the round in which each loser was dropped."""
    race, dropped = start_race(names), {}
    for round, row in enumerate(losses):
        race = observe(race, dict(zip(names, row, strict=True)))
        if round % every == every - 1:
            losers = [loser.name for loser in find_losers(race, alpha)]
            dropped |= dict.fromkeys(losers, round + 1)
            race = drop(race, losers)
    return race, dropped


def noise(random, rounds, kind):
    """Return losses of equal contestants with a common part, which pairing removes."""
    shape = (rounds, len(NAMES))
    own = {"normal": random.standard_normal, "lognormal": lambda shape: random.lognormal(0, 1, shape)}[kind](shape)
    return own + 5 * random.standard_normal((rounds, 1))


@pytest.mark.parametrize("kind", ["normal", "lognormal"])
def test_of_equal_contestants_one_is_dropped_as_rarely_as_promised(kind):
    """Everyone is a best one here, so any drop is a mistake. A chance of 0.2 gives 60 +- 7 mistakes in 300 races."""
    alpha, races = 0.2, 300
    random = np.random.default_rng(0)
    wrong = sum(bool(run_race(noise(random, 300, kind), alpha)[1]) for _ in range(races))
    assert wrong <= alpha * races + 3 * math.sqrt(races * alpha * (1 - alpha))


def width(rounds, level, deviation, best_at=500):
    """Return half the length of the interval, from the formula of Waudby-Smith et al. (2021), eq. 5."""
    squared = (-2 * math.log(level) + math.log(-2 * math.log(level) + 1)) / best_at
    inside = rounds * squared + 1
    return deviation * math.sqrt(2 * inside / (rounds**2 * squared) * math.log(math.sqrt(inside) / level))


def test_who_is_behind_by_a_gap_is_dropped_when_the_interval_is_narrower_than_it():
    gaps, alpha = np.array([0.0, 0.5, 1.0, 2.0]), 0.1
    random, pairs = np.random.default_rng(1), 6
    best_kept, late = 0, 0
    for _ in range(40):
        losses = gaps + DEVIATION / math.sqrt(2) * random.standard_normal((900, 4))
        race, dropped = run_race(losses, alpha, every=1)
        best_kept += race.racing == ("a",)
        for name, gap in zip("bcd", gaps[1:], strict=True):
            latest = next(n for n in range(50, 10_000) if 2 * width(n, alpha / pairs, DEVIATION) <= gap)
            late += dropped[name] > 1.1 * latest  # The deviation is estimated.
    assert best_kept >= 36
    assert late <= 4


def test_a_loser_names_whom_it_is_behind_with_the_interval():
    race = start_race(NAMES[:3])
    random = np.random.default_rng(2)
    rows = np.stack([random.standard_normal(200) + shift for shift in (0.0, -3.0, 5.0)], 1)
    for row in rows:
        race = observe(race, dict(zip(NAMES, row, strict=False)))
    assert find_best(race) == "b"
    first, last = find_losers(race, 0.05)
    for loser, column in ((first, 0), (last, 2)):
        differences = rows[:, column] - rows[:, 1]
        half = width(200, 0.05 / 3, differences.std(ddof=1))
        assert (loser.name, loser.against) == (NAMES[column], "b")
        assert loser.mean == pytest.approx(differences.mean(), rel=1e-12)
        assert (loser.low, loser.high) == pytest.approx((loser.mean - half, loser.mean + half), rel=1e-9)


@given(st.lists(st.lists(st.floats(-10, 10), min_size=3, max_size=3), min_size=1, max_size=120), st.randoms())
def test_a_race_depends_on_its_rounds_alone_and_never_drops_the_best(rows, random):
    """The state after a drop is that of a race in which the dropped one was never compared."""
    race, names = start_race("abc"), "abc"
    for row in rows:
        race = observe(race, dict(zip(names, row, strict=True)))
    assert find_best(race) not in [loser.name for loser in find_losers(race)]
    one = random.choice(names)
    others = tuple(name for name in names if name != one)
    alone = start_race(others)
    for row in rows:
        alone = observe(alone, dict(zip(names, row, strict=True)))
    assert drop(race, [one])._replace(entered=others) == alone


def test_a_race_refuses_what_makes_no_sense():
    with pytest.raises(ValueError, match="one or more, each once"):
        start_race(["a", "a"])
    race = start_race(["a", "b"])
    with pytest.raises(ValueError, match="b has no loss"):
        observe(race, {"a": 1.0})
    with pytest.raises(ValueError, match="nobody would be left"):
        drop(race, ["a", "b"])
