"""What every replay policy of ``online_meta.replay`` keeps."""

import random
from collections import Counter

import numpy as np
import pytest
import torch

import online_meta.replay
from online_meta import registry
from online_meta.draws import Draw, generator
from online_meta.replay.uniform import uniform

POLICIES = {name: registry.load(online_meta.replay, name) for name in registry.names(online_meta.replay)}
UNBOUNDED = {"all"}
"""The policies that do not obey ``batch``."""

UNBIASED = {"all", "uniform"}
"""The policies whose weighted mean is that of all rounds in expectation, without being asked about the round."""

every_policy = pytest.mark.parametrize("name", POLICIES)
every_unbiased_policy = pytest.mark.parametrize("name", sorted(UNBIASED & POLICIES.keys()))


def some_draws():
    chance = random.Random(3)
    for _ in range(300):
        count = chance.choice((1, 2, 3, 10, 25, 26, 1000))
        yield Draw(chance.randrange(10**6), count - 1, chance.randrange(4), count, chance.choice((1, 2, 25, 40)))


@every_policy
def test_picks_are_distinct_past_rounds_of_positive_weight_and_no_more_than_asked_for(name):
    for draw in some_draws():
        picks = POLICIES[name](draw)
        rounds = [pick.round for pick in picks]
        assert picks, draw
        assert all(isinstance(round, int) and 0 <= round < draw.count for round in rounds), draw
        assert len(set(rounds)) == len(rounds), draw
        assert all(np.isfinite(pick.weight) and pick.weight > 0 for pick in picks), draw
        if name not in UNBOUNDED:
            assert len(picks) <= draw.batch, draw


@every_policy
def test_picks_are_a_pure_function_of_the_draw(name):
    draws = list(some_draws())
    first = [POLICIES[name](draw) for draw in draws]
    np.random.seed(1)
    random.seed(1)
    torch.manual_seed(1)
    again = [POLICIES[name](draw) for draw in reversed(draws)]
    assert again[::-1] == first


@every_policy
@pytest.mark.parametrize("count", [1, 2, 24, 25])
def test_everything_is_revisited_while_it_fits(name, count):
    picks = POLICIES[name](Draw(0, count - 1, 0, count, 25))
    assert sorted(pick.round for pick in picks) == list(range(count))
    assert len({pick.weight for pick in picks}) == 1


@every_unbiased_policy
def test_the_weighted_mean_is_that_of_all_rounds_in_expectation(name):
    """Each round's expected share of the weight is 1 / count: a chi-square test with 11 degrees of freedom."""
    count, batch, draws = 12, 5, 6000
    shares = np.zeros(count)
    for seed in range(draws):
        picks = POLICIES[name](Draw(seed, count - 1, 0, count, batch))
        total = sum(pick.weight for pick in picks)
        for pick in picks:
            shares[pick.round] += pick.weight / total
    # A draw's share of one round is 1/b with probability b/n, negatively correlated between rounds: dividing by
    # its variance (1 - f) / (b n), f = b/n, times n / (n - 1) makes the sum a chi-square of n - 1.
    variance = (1 - batch / count) / (batch * count) * count / (count - 1)
    chi_square = float(np.square(shares / draws - 1 / count).sum()) * draws / variance
    assert chi_square < 31.3  # the 99.9 % point; the seeds are fixed, so it holds or it does not


def test_uniform_draws_every_pair_of_rounds_alike():
    count, draws = 6, 9000
    pairs = Counter(frozenset(p.round for p in uniform(Draw(9, count - 1, step, count, 2))) for step in range(draws))
    expected = draws / 15
    assert len(pairs) == 15
    assert sum((seen - expected) ** 2 / expected for seen in pairs.values()) < 36.1  # 99.9 % at 14 degrees of freedom


def test_each_part_of_a_draws_name_changes_it():
    draw = Draw(seed=4, round=999, step=0, count=1000, batch=10)
    others = [draw._replace(seed=5), draw._replace(step=1), draw._replace(round=1000, count=1000)]
    picks = [uniform(one) for one in (draw, *others)]
    assert all(picks[i] != picks[j] for i in range(4) for j in range(i))


def test_a_generator_is_a_function_of_its_key_that_other_versions_must_keep():
    """Parameters that a run has learned depend on these numbers; a change of them breaks every resumed run."""
    assert generator(0, 0, 0).integers(2**32, size=3).tolist() == [582496169, 60417458, 4027530181]
    assert [pick.round for pick in uniform(Draw(7, 99, 1, 100, 5))] == [2, 11, 17, 28, 84]
