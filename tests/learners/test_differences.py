"""Paired differences: exact moments, and intervals that hold at all times at once."""

import math
from fractions import Fraction

import numpy as np
import pytest

from online_meta.regret.differences import ALPHA, BEST_AT, MIN_ROUNDS, Differences, confidence_sequence, judge

RUNS, ROUNDS = 500, 2000
KINDS = {
    "normal": lambda random, shape: random.standard_normal(shape),
    "heavy tails": lambda random, shape: random.standard_t(3, shape),
    "two lognormal losses": lambda random, shape: random.lognormal(0, 1, shape) - random.lognormal(0, 1, shape),
    "drift": lambda random, shape: random.standard_normal(shape) + np.exp(-np.arange(shape[1]) / 100),
}
SKEWED = {
    "exponential": (lambda random, shape: random.exponential(1, shape) - 1, -1.0, 0.07),
    "lognormal": (lambda random, shape: random.lognormal(0, 1, shape) - math.exp(0.5), 0.04, 0.12),
    "lognormal, sigma 2": (lambda random, shape: random.lognormal(0, 2, shape) - math.exp(2), 0.40, 0.65),
    "1 % of the rounds": (lambda random, shape: (random.random(shape) < 0.01) - 0.01, 0.45, 0.75),
}
"""Differences with the mean 0, and the least and the largest share of runs that miss it, around what the docs state."""


def sums_of(values):
    return Differences(len(values), math.fsum(values), math.fsum(value * value for value in values))


def test_mean_variance_and_standard_error_are_those_of_the_differences():
    values = [0.1, -2.0, 3.5, 1e3, -7.25]
    exact = [Fraction(value) for value in values]
    mean = sum(exact) / 5
    variance = sum((value - mean) ** 2 for value in exact) / 4
    found = sums_of(values)
    assert found.mean() == pytest.approx(float(mean), rel=1e-15)
    assert found.variance() == pytest.approx(float(variance), rel=1e-14)
    assert found.standard_error() == pytest.approx(math.sqrt(5 * variance), rel=1e-14)
    assert (Differences(0, 0.0, 0.0).mean(), Differences(1, 3.0, 9.0).variance()) == (0.0, 0.0)


def test_the_moments_of_two_sets_are_those_of_their_union():
    random = np.random.default_rng(0)
    one, other = random.standard_normal(40), random.lognormal(0, 1, 70)
    merged = Differences(*(mine + others for mine, others in zip(sums_of(one), sums_of(other), strict=True)))
    both = np.concatenate([one, other])
    assert merged.mean() == pytest.approx(both.mean(), rel=1e-13)
    assert merged.variance() == pytest.approx(both.var(ddof=1), rel=1e-13)


@pytest.mark.parametrize("rounds", [MIN_ROUNDS, 137, 100_000])
def test_the_ends_are_where_the_mixture_of_normals_reaches_one_over_alpha(rounds):
    """Robbins' mixture over a mean N(0, r^2) is a martingale under the truth, so it exceeds 1/alpha rarely (Ville)."""
    deviation, mean = 1.7, 0.3
    squares = (rounds - 1) * deviation**2 + rounds * mean**2
    low, high = confidence_sequence(Differences(rounds, rounds * mean, squares))
    prior = (-2 * math.log(ALPHA) + math.log(-2 * math.log(ALPHA) + 1)) / BEST_AT
    for end in (low, high):
        distance = rounds * (mean - end) / deviation
        means = np.linspace(-60, 60, 2_000_001) * math.sqrt(prior)
        ratio = means * distance - rounds * means**2 / 2 - means**2 / (2 * prior)
        mixture = np.trapezoid(np.exp(ratio), means) / math.sqrt(2 * math.pi * prior)
        assert mixture == pytest.approx(1 / ALPHA, rel=1e-6)
    assert low < mean < high


@pytest.mark.parametrize("kind", KINDS)
def test_all_intervals_of_a_run_contain_the_mean_at_once(kind):
    """Of runs of 2,000 rounds looked at after every round, at most 5 % (up to chance) ever miss the mean so far."""
    random = np.random.default_rng(1)
    values = KINDS[kind](random, (RUNS, ROUNDS))
    expected = np.exp(-np.arange(ROUNDS) / 100) if kind == "drift" else np.zeros(ROUNDS)
    rounds = np.arange(1, ROUNDS + 1)
    totals, squares = values.cumsum(1), (values**2).cumsum(1)
    truth = expected.cumsum() / rounds
    missed = naive = 0
    for total, square in zip(totals, squares, strict=True):
        looks = rounds[MIN_ROUNDS - 1 :: 10]
        missed += misses(total, square, truth, looks)
        spread = 1.96 * np.sqrt((square - total**2 / rounds) / rounds**2)[looks - 1]
        naive += bool((abs(total[looks - 1] / looks - truth[looks - 1]) > spread).any())
    print(f"{kind}: from round {MIN_ROUNDS} {missed / RUNS:.1%}")
    assert missed <= RUNS * ALPHA + 2 * math.sqrt(RUNS * ALPHA * (1 - ALPHA))
    assert naive > 4 * RUNS * ALPHA, "an interval for a single look misses often"


def misses(total, square, truth, looks):
    """Return whether any of the intervals at ``looks`` misses the ``truth``, given the running sums of a run."""
    spans = [confidence_sequence(Differences(int(n), total[n - 1], square[n - 1])) for n in looks]
    low, high = np.array(spans).T
    return bool(((truth[looks - 1] < low) | (truth[looks - 1] > high)).any())


@pytest.mark.parametrize("kind", SKEWED)
def test_one_sided_differences_are_missed_as_often_as_documented(kind):
    """The intervals hold in the limit alone: rare large differences are missed by those who look early."""
    draw, least, largest = SKEWED[kind]
    random = np.random.default_rng(2)
    values = draw(random, (RUNS, ROUNDS))
    truth, rounds = np.zeros(ROUNDS), np.arange(1, ROUNDS + 1)
    early = late = 0
    for total, square in zip(values.cumsum(1), (values**2).cumsum(1), strict=True):
        early += misses(total, square, truth, rounds[MIN_ROUNDS - 1 :: 10])
        late += misses(total, square, truth, rounds[BEST_AT - 1 :: 10])
    print(f"{kind}: from round {MIN_ROUNDS} {early / RUNS:.1%}, from round {BEST_AT} {late / RUNS:.1%}")
    assert least < early / RUNS < largest
    assert late <= early


def test_too_few_rounds_have_no_interval():
    assert confidence_sequence(Differences(MIN_ROUNDS - 1, 5.0, 1.0)) is None
    assert confidence_sequence(Differences(MIN_ROUNDS, 5.0, 1.0)) is not None


@pytest.mark.parametrize("wrong", [{"alpha": 0.0}, {"alpha": 1.0}, {"best_at": 0.0}, {"alpha": math.nan}])
def test_an_alpha_or_a_number_of_rounds_out_of_range_is_refused(wrong):
    with pytest.raises(ValueError, match="alpha is between 0 and 1, best_at is above 0"):
        confidence_sequence(Differences(100, 1.0, 1.0), **wrong)


@pytest.mark.parametrize(
    ("interval", "word"),
    [
        (None, "too early"),
        ((-2.0, -0.001), "ahead"),
        ((0.001, 2.0), "behind"),
        ((-0.1, 0.1), "level"),
        ((0.0, 0.05), "level"),
        ((-0.1, 0.11), "too early"),
        ((-2.0, 0.0), "too early"),
    ],
)
def test_an_interval_in_one_word(interval, word):
    assert judge(interval, 0.1) == word
