"""The regret ledger: sums, comparators at their own round, and a game whose regret is known in closed form."""

import math
import random
import statistics
from fractions import Fraction

import pytest
import torch

import online_meta as om
from online_meta.learners.ftml import FollowTheMetaLeader
from online_meta.regret.ledger import Comparator, LossSummary, Regret, RegretLedger
from online_meta.replay.all import all as every_round

FTML = [3.0, 2.0, 1.5, 1.0]
OTHER = [3.5, 2.5, 1.0, 0.5]


def ledger():
    built = RegretLedger(["other", "ftml"])
    for mine, other in zip(FTML, OTHER, strict=True):
        built.record({"ftml": mine, "other": other})
    return built


def test_losses_are_summed_by_learner():
    built = ledger()
    assert len(built) == 4
    assert built.learners == ("other", "ftml")
    assert [built.cumulative_loss("ftml", rounds) for rounds in range(5)] == [0.0, 3.0, 5.0, 6.5, 7.5]
    assert built.cumulative_loss("other") == 7.5


def test_the_mean_is_over_the_last_rounds_or_all_if_there_are_fewer():
    built = ledger()
    assert [built.mean_loss("ftml", last) for last in (1, 2, 4, 100)] == [1.0, 1.25, 1.875, 1.875]
    assert built.mean_loss("ftml", 0) is None
    assert built.mean_loss("ftml", -1) is None
    assert RegretLedger(["ftml"]).mean_loss("ftml", 5) is None


def test_baselines_are_compared_at_the_newest_round_and_comparators_at_theirs():
    def against_other(regret):
        return regret["other"].value, regret["other"].as_of_round, regret["other"].kind, regret["other"].rounds

    built = ledger()
    assert against_other(built.regret()) == (0.0, 4, "baseline", 4)
    built.compare(Comparator("hindsight", 3, 4.25, 0.5))
    right = Regret(6.5 - 4.25, 0.5, 3, "hindsight", rounds=3)
    assert built.regret()["hindsight"] == right
    built.record({"ftml": 100.0, "other": 0.0})
    assert built.regret()["hindsight"] == right
    assert against_other(built.regret()) == (100.0, 5, "baseline", 5)


def test_the_standard_error_against_a_baseline_is_that_of_the_paired_differences():
    differences = [mine - other for mine, other in zip(FTML, OTHER, strict=True)]
    assert ledger().regret()["other"].standard_error == pytest.approx(2 * statistics.stdev(differences))
    assert ledger().regret()["other"].standard_error > 0


def test_a_baseline_gets_an_interval_and_a_word_once_there_are_enough_rounds():
    built, chance = RegretLedger(["ftml", "worse", "same", "unclear"]), random.Random(4)
    for round in range(400):
        mine = 1 + chance.random()
        if round == 49:
            found = built.regret()["worse"]
            assert (found.interval, found.verdict) == (None, "too early")
        noise = chance.gauss(0, 1)
        built.record({"ftml": mine, "worse": mine + 0.5 + noise, "same": mine + noise / 1000, "unclear": mine + noise})
    found = built.regret()
    assert {name: regret.verdict for name, regret in found.items()} == {
        "worse": "ahead",
        "same": "level",
        "unclear": "too early",
    }
    low, high = found["worse"].interval
    assert low < found["worse"].value < high < 0
    assert found["same"].margin == pytest.approx(0.01 * built.cumulative_loss("same"))


def test_a_large_loss_does_not_disturb_later_windows_or_differences():
    built = RegretLedger(["ftml", "other"])
    for round in range(300):
        large = 3.4e38 if round == 20 else 0.0
        built.record({"ftml": 0.227 + large, "other": 0.5 + large})
    assert built.mean_loss("ftml", 100) == pytest.approx(0.227, rel=1e-15)
    assert built.summarise("other", 21, 299).total == pytest.approx(0.5 * 278, rel=1e-15)
    assert built.regret()["other"].value == pytest.approx(-0.273 * 299, rel=1e-12)


def test_a_newer_evaluation_replaces_the_older_one():
    built = ledger()
    built.compare(Comparator("hindsight", 2, 4.0, 0.0))
    newer = Comparator("hindsight", 4, 8.0, 0.25)
    built.compare(newer)
    assert built.comparator("hindsight") == newer
    assert built.comparator("closed_form") is None
    assert built.regret()["hindsight"] == Regret(-0.5, 0.25, 4, "hindsight", rounds=4)
    assert built.regret_against(Comparator("hindsight", 2, 4.0, 0.0)).value == 1.0


def test_a_skipped_round_enters_no_mean():
    built = ledger()
    built.record(None)
    assert len(built) == 5
    assert built.cumulative_loss("ftml") == built.cumulative_loss("other") == 7.5
    built.compare(Comparator("hindsight", 5, 7.0, 0.0))
    assert built.regret()["hindsight"] == Regret(0.5, 0.0, 5, "hindsight", rounds=4)
    assert built.mean_loss("ftml", 2) == 1.0
    assert built.regret()["other"].rounds == 4


def test_before_round_0_there_is_no_regret():
    assert RegretLedger(["ftml", "other"]).regret() == {}


@pytest.mark.parametrize("losses", [{"other": 1.0}, {"ftml": 1.0, "other": 1.0, "third": 1.0}, {}])
def test_a_round_without_the_loss_of_the_leader_or_with_that_of_a_stranger_is_refused(losses):
    built = ledger()
    with pytest.raises(ValueError, match=r"round 4 .*the learners are \['ftml', 'other'\]"):
        built.record(losses)
    assert len(built) == 4
    assert built.cumulative_loss("ftml") == 7.5


def test_a_learner_that_does_not_play_has_no_part_in_a_round():
    built = ledger()
    built.record({"ftml": 4.0})
    assert built.summarise("ftml") == LossSummary(11.5, 5, 0)
    assert built.summarise("other") == LossSummary(7.5, 4, 0)
    assert (built.regret()["other"].value, built.regret()["other"].rounds) == (0.0, 4)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e101, None])
def test_a_loss_that_is_not_finite_is_charged_to_its_learner_alone(bad):
    built = RegretLedger(["ftml", "other"], loss_cap=50.0)
    built.record({"ftml": 1.0, "other": 2.0})
    built.record({"ftml": 3.0, "other": bad})
    assert built.summarise("ftml") == LossSummary(4.0, 2, 0)
    assert built.summarise("other") == LossSummary(52.0, 2, 1)
    found = built.regret()["other"]
    assert (found.value, found.rounds) == (-48.0, 2)


def test_a_loss_that_is_not_finite_is_never_charged_less_than_another_of_the_round():
    built = RegretLedger(["ftml", "other", "third"], loss_cap=50.0)
    built.record({"ftml": math.nan, "other": 900.0, "third": math.inf})
    assert [built.cumulative_loss(name) for name in built.learners] == [900.0, 900.0, 900.0]
    assert [built.summarise(name).charged for name in built.learners] == [1, 0, 1]


def test_leaked_rounds_are_left_out_of_the_figures_without_leaks():
    built = ledger()
    built.record({"ftml": 7.0, "other": 9.0}, leaked=True)
    assert built.summarise("ftml") == LossSummary(14.5, 5, 0)
    assert built.summarise("ftml", leaks=False) == LossSummary(7.5, 4, 0)
    assert [built.regret(leaks=leaks)["other"].value for leaks in (True, False)] == [-2.0, 0.0]
    assert built.regret(leaks=False)["other"].rounds == 4


@pytest.mark.parametrize("rounds", [0, 5, -1])
def test_a_comparator_of_rounds_that_are_not_recorded_is_refused(rounds):
    with pytest.raises(ValueError, match=f"as of round {rounds}; the ledger has 4 rounds"):
        ledger().compare(Comparator("hindsight", rounds, 1.0, 0.0))


@pytest.mark.parametrize("rounds", [-1, 5])
def test_a_sum_over_rounds_that_are_not_recorded_is_refused(rounds):
    with pytest.raises(IndexError, match=rf"rounds is {rounds}; the ledger has 4 rounds"):
        ledger().cumulative_loss("ftml", rounds)


def test_a_ledger_without_the_main_learner_is_refused():
    with pytest.raises(ValueError, match="'ftml'"):
        RegretLedger(["other"])


def follow_the_leader(targets):
    """Play f_t(w) = (w - y_t)^2: one step of SGD with rate 1/2 on all rounds moves to their mean exactly."""

    def loss(params, batch):
        return (params["w"] - batch.y).square().mean()

    inner = om.Inner(loss, om.rules.sgd(), steps=0)
    engine = om.MetaOptimizer(inner.init({"w": torch.zeros(1, dtype=torch.float64)}), "sgd", 0.5)
    learner = FollowTheMetaLeader(inner, om.exact(inner), engine, replay=every_round())
    built = RegretLedger(["ftml"])
    for target in targets:
        batch = om.Batch(torch.zeros(1), torch.tensor([target], dtype=torch.float64))
        task = om.Task(batch, batch)
        built.record({"ftml": learner.score(task).loss_after})
        learner.learn(task)
    return built


@pytest.mark.parametrize("rounds", [1, 2, 17, 60])
def test_online_least_squares_has_its_closed_form_regret(rounds):
    """y_t = t: the mean of y_1..y_{t-1} is t/2, so regret_T = 1 + sum_{t=2}^T (1/t) (t/2)^2 = 3/4 + T (T + 1) / 8.

    (sum_t (y_t - mean_T)^2 = sum_t (1 - 1/t) (y_t - mean_{t-1})^2: Welford, 1962; w_1 = 0.)
    """
    targets = range(1, rounds + 1)
    built = follow_the_leader(targets)
    mean = Fraction(sum(targets), rounds)
    best = sum((y - mean) ** 2 for y in targets)
    built.compare(Comparator("closed_form", rounds, float(best), 0.0))
    right = Fraction(3, 4) + Fraction(rounds * (rounds + 1), 8)
    assert built.regret()["closed_form"].value == pytest.approx(float(right), rel=1e-12)


def test_a_repeated_target_costs_only_its_first_round():
    built = follow_the_leader([4.0] * 9)
    built.compare(Comparator("closed_form", 9, 0.0, 0.0))
    assert built.regret()["closed_form"].value == 16.0


def test_any_learner_leads():
    built = RegretLedger(["ftml", "other"], leader="other")
    built.record({"ftml": 3.0, "other": 1.0})
    assert [*built.regret()] == ["ftml"]
    assert built.regret()["ftml"].value == -2.0
    built.compare(Comparator("hindsight", 1, 0.25, 0.0))
    assert built.regret()["hindsight"].value == 0.75
    with pytest.raises(ValueError, match="the ledger needs 'third' among them"):
        RegretLedger(["ftml"], leader="third")
