"""The verdict on whether meta-learning pays: its three states in words, and how often it is wrong."""

import math

import numpy as np
import pytest

import online_meta.learners
from online_meta import registry
from online_meta.learners import meta_learns
from online_meta.regret.differences import ALPHA, BEST_AT, MIN_ROUNDS, Differences, confidence_sequence
from online_meta.regret.verdict import PlayingAnswer, display_name, give_verdict

MARGIN = 0.01
WITHOUT = {
    "constant",
    "from_scratch",
    "ftl_fine_tune",
    "logistic_head",
    "nearest_centroid",
    "pooled_logistic",
    "pooled_ridge",
    "ridge_head",
    "last_value",
    "river",
    "sklearn",
    "train_on_everything",
}
LEARNING = {
    "aruba",
    "c_maml",
    "dp_mixture",
    "ftml",
    "good_embedding",
    "hierarchical_bayes",
    "moml",
    "online_reptile",
}


def spread(rounds, mean, deviation):
    """Return sums of differences that have exactly this mean and standard deviation."""
    return Differences(rounds, rounds * mean, (rounds - 1) * deviation**2 + rounds * mean**2)


def answer(name, gain, deviation=0.1, weight=None, meta_learns=False, rounds=400, loss=1.0):
    return PlayingAnswer(name, meta_learns, spread(rounds, -gain, deviation), loss, weight)


def half_width(rounds, deviation, alpha):
    """Return the half of the interval by the formula of Waudby-Smith et al., written out once more."""
    per_round = (-2 * math.log(alpha) + math.log(-2 * math.log(alpha) + 1)) / BEST_AT
    inner = rounds * per_round + 1
    return deviation * math.sqrt(2 * inner / (rounds**2 * per_round) * math.log(math.sqrt(inner) / alpha))


def pool(*answers, **more):
    return give_verdict(answers, "pool", MARGIN, leader="ftml", **more)


FTML = answer("ftml", 0.2, weight=0.1, meta_learns=True)
TEN = answer("ftml@10", 0.0, weight=0.82, meta_learns=True)


def test_meta_learning_pays():
    found = pool(FTML, TEN, answer("pooled_ridge", 0.03, weight=0.05), answer("constant", 0.5, weight=0.03))
    width = half_width(400, 0.1, ALPHA / 2)
    assert found.state == "pays"
    assert found.sentence == (
        "Meta-learning pays here: the pool is ahead of the best that does not learn across tasks (pooled ridge) by "
        f"0.030 +- {width:.3f} a task; 82 % of its weight is on FTML with 10 steps."
    )
    assert (found.reference, found.best_without, found.rounds) == ("pool", "pooled_ridge", 400)
    assert found.gain == pytest.approx(0.03, rel=1e-12)
    assert found.interval == pytest.approx((0.03 - width, 0.03 + width), rel=1e-9)
    assert found.weights == {"ftml": 0.1, "ftml@10": 0.82, "pooled_ridge": 0.05, "constant": 0.03}


@pytest.mark.parametrize(
    ("baseline", "words"),
    [
        (answer("pooled_ridge", -0.5, weight=0.9), "the pool is behind the best"),
        (answer("pooled_ridge", 0.0001, 0.001, weight=0.9), "the pool is level with the best"),
        (answer("pooled_ridge", 0.5, weight=0.9), "the pool is ahead of the best"),
    ],
    ids=["behind", "level", "ahead, by its weight on what does not learn across tasks"],
)
def test_meta_learning_does_not_pay(baseline, words):
    found = pool(answer("ftml", 0.6, weight=0.1, meta_learns=True), baseline)
    assert found.state == "does_not"
    assert found.sentence.startswith(f"Meta-learning does not pay here (yet): {words} that does not learn across tasks")
    assert found.sentence.endswith("; 90 % of its weight is on pooled ridge.")
    assert ("only 10 % of its weight is on learners that learn across tasks" in found.sentence) == ("ahead" in words)


def test_before_the_interval_excludes_zero_it_is_too_early():
    found = pool(FTML, answer("pooled_ridge", 0.03, 1.0, weight=0.9))
    assert found.state == "too_early"
    assert found.sentence.startswith(
        "It is too early to say whether meta-learning pays here: so far, the pool's loss is "
    )
    by = f"0.03 +- {half_width(400, 1.0, ALPHA):.2f} a task over 400 rounds; 90 % of its weight is on pooled ridge."
    assert found.sentence.endswith(
        f"lower than that of the best that does not learn across tasks (pooled ridge) by {by}"
    )
    few = pool(FTML, answer("pooled_ridge", 5.0, rounds=MIN_ROUNDS - 1, weight=0.9))
    assert (few.state, few.interval) == ("too_early", None)
    assert few.sentence.endswith(f": {MIN_ROUNDS - 1} rounds are scored, and an interval needs {MIN_ROUNDS}.")


def test_the_interval_holds_for_the_best_of_several():
    """The same lead is enough over one baseline, and too little over the best of twenty."""
    width = half_width(400, 0.1, ALPHA)
    lead, learning = 1.05 * width, answer("ftml", 0.0, weight=0.9, meta_learns=True)
    assert pool(learning, answer("constant", lead)).state == "pays"
    others = [answer(f"constant_{at}", 3.0) for at in range(19)]
    found = pool(learning, answer("constant", lead), *others)
    assert (found.state, found.best_without) == ("too_early", "constant")
    assert found.interval[0] == pytest.approx(lead - half_width(400, 0.1, ALPHA / 20), rel=1e-6)


def test_one_baseline_that_may_be_as_good_is_enough_to_wait():
    found = pool(TEN, answer("constant", 0.1), answer("from_scratch", 0.5, 5.0))
    assert (found.state, found.best_without) == ("too_early", "constant")
    by = f"0.50 +- {half_width(400, 5.0, ALPHA / 2):.2f}"
    assert f"but it is not certain that it is ahead of from scratch, by {by}; 82 %" in found.sentence


def test_without_a_pool_the_leader_takes_its_place():
    baseline = answer("from_scratch", 0.8)
    found = give_verdict([baseline, answer("moml", 0.1, meta_learns=True)], "ftml", MARGIN, leader="ftml")
    assert found.state == "pays"
    assert found.sentence == (
        "Meta-learning pays here: FTML is ahead of the best that does not learn across tasks (from scratch) by "
        f"0.800 +- {half_width(400, 0.1, ALPHA):.3f} a task."
    )
    assert found.weights == {}


@pytest.mark.parametrize(
    ("answers", "leads", "end"),
    [
        ([], True, "no learner plays that does not learn across tasks."),
        ([answer("moml", 1.0, meta_learns=True)], True, "no learner plays that does not learn across tasks."),
        ([answer("constant", 1.0)], False, "no learner plays that learns across tasks and leads."),
    ],
)
def test_without_both_kinds_of_learners_nothing_is_said(answers, leads, end):
    found = give_verdict(answers, "ftml", MARGIN, leader="ftml", leader_meta_learns=leads)
    assert (found.state, found.interval, found.gain, found.best_without) == ("too_early", None, None, None)
    assert found.sentence == f"It cannot be said whether meta-learning pays here: {end}"


def test_what_can_be_switched_off_is_listed_with_what_it_costs():
    costs = {"ftml": 0.02, "constant": 0.0004, "from_scratch": 1.25, "moml": 0.03, "pooled_ridge": 0.001}
    answers = [
        answer("ftml", 3.0, weight=0.0, meta_learns=True),  # leads
        answer("ftml@10", 0.0, weight=0.97, meta_learns=True),
        answer("pooled_ridge", 0.2, weight=0.001),  # the verdict needs it
        answer("from_scratch", 1.0, weight=0.001),
        answer("constant", 1.0, weight=0.0),
        answer("moml", 1.0, weight=0.001, meta_learns=True),
        answer("moml@10", 1.0, weight=0.012, meta_learns=True),  # has weight
        answer("ridge_head", 1.0, 10.0, weight=0.001),  # may be as good
    ]
    found = pool(*answers, seconds_per_round=costs)
    assert [one.learner for one in found.can_be_switched_off] == ["from_scratch", "constant"]
    assert [one.seconds_per_round for one in found.can_be_switched_off] == [1.25, 0.0004]
    assert found.advice == (
        "Can be switched off: from scratch (1.2 s a round) and constant (0.4 ms a round). The pool is ahead of each of "
        "them, and gives each under 1 % of its weight."
    )
    assert found.seconds_per_round == costs


@pytest.mark.parametrize("wrong", [1, 2, 7])
def test_if_a_baseline_is_as_good_pays_is_hardly_ever_said(wrong):
    """Of runs looked at after every 25th round, fewer than alpha ever say "pays" although one baseline is level.

    The other baselines are behind by more and less noisy differences, so that one of these is often the best so far.
    """
    random, runs, rounds = np.random.default_rng(wrong), 100, 600
    looks = range(MIN_ROUNDS, rounds + 1, 25)
    said = 0
    for _ in range(runs):
        level = random.standard_normal(rounds) * 3
        others = random.standard_normal((wrong, rounds)) - 0.3
        series = np.vstack([level, others])
        totals, squares = series.cumsum(1), (series**2).cumsum(1)
        said += any(
            pool(
                TEN,
                *(
                    PlayingAnswer(f"b{at}", False, Differences(look, totals[at, look - 1], squares[at, look - 1]), 1.0)
                    for at in range(wrong + 1)
                ),
            ).state
            == "pays"
            for look in looks
        )
    assert said <= ALPHA * runs


def test_the_simulation_would_say_pays_if_only_the_best_so_far_were_judged():
    """The test above can fail: without the condition on every baseline, far more runs than alpha say "pays"."""
    random, runs, rounds = np.random.default_rng(2), 100, 600
    said = 0
    for _ in range(runs):
        series = np.vstack([random.standard_normal(rounds) * 3, random.standard_normal((2, rounds)) - 0.3])
        totals, squares = series.cumsum(1), (series**2).cumsum(1)
        for look in range(MIN_ROUNDS, rounds + 1, 25):
            best = int(np.argmax(totals[:, look - 1]))
            sums = Differences(look, totals[best, look - 1], squares[best, look - 1])
            _, high = confidence_sequence(sums, ALPHA / 3)
            if high < 0:
                said += 1
                break
    assert said > 3 * ALPHA * runs


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("ftml", "FTML"),
        ("ftml@10", "FTML with 10 steps"),
        ("ftml@1", "FTML with 1 step"),
        ("online_reptile@0", "online reptile with 0 steps"),
        ("pooled_ridge", "pooled ridge"),
        ("ftml@meta_sgd10", "FTML with 10 steps of meta sgd"),
        ("fast@ridge_head", "fast with a ridge head"),
    ],
)
def test_answers_have_names_for_people(name, shown):
    assert display_name(name) == shown


def test_each_learner_says_whether_it_learns_across_tasks():
    known = set(registry.file_names(online_meta.learners))
    assert known > {"ftml", "from_scratch", "constant"}
    assert {name: meta_learns(name) for name in WITHOUT & known} == dict.fromkeys(WITHOUT & known, False)
    assert {name: meta_learns(name) for name in LEARNING & known} == dict.fromkeys(LEARNING & known, True)
    assert meta_learns("online_meta.learners.constant:build") is False
    assert meta_learns("package_that_is_gone:build") is True
