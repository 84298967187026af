"""The regret ledger: sums, comparators at their own round, and a game whose regret is known in closed form."""

import math
from fractions import Fraction

import pytest
import torch

import online_meta as om
from online_meta.learners.ftml import FollowTheMetaLeader
from online_meta.regret.ledger import Comparator, Regret, RegretLedger
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
    built = ledger()
    assert built.regret() == {"other": Regret(0.0, 0.0, 4, "baseline")}
    built.compare(Comparator("hindsight", 3, 4.25, 0.5))
    right = Regret(6.5 - 4.25, 0.5, 3, "hindsight")
    assert built.regret() == {"hindsight": right, "other": Regret(0.0, 0.0, 4, "baseline")}
    built.record({"ftml": 100.0, "other": 0.0})
    assert built.regret() == {"hindsight": right, "other": Regret(100.0, 0.0, 5, "baseline")}


def test_a_newer_evaluation_replaces_the_older_one():
    built = ledger()
    built.compare(Comparator("hindsight", 2, 4.0, 0.0))
    newer = Comparator("hindsight", 4, 8.0, 0.25)
    built.compare(newer)
    assert built.comparator("hindsight") == newer
    assert built.comparator("closed_form") is None
    assert built.regret()["hindsight"] == Regret(-0.5, 0.25, 4, "hindsight")
    assert built.regret_against(Comparator("hindsight", 2, 4.0, 0.0)).value == 1.0


def test_a_skipped_round_counts_and_adds_no_loss():
    built = ledger()
    built.record(None)
    assert len(built) == 5
    assert built.cumulative_loss("ftml") == built.cumulative_loss("other") == 7.5
    built.compare(Comparator("hindsight", 5, 7.0, 0.0))
    assert built.regret()["hindsight"] == Regret(0.5, 0.0, 5, "hindsight")


def test_before_round_0_there_is_no_regret():
    assert RegretLedger(["ftml", "other"]).regret() == {}


@pytest.mark.parametrize("losses", [{"ftml": 1.0}, {"ftml": 1.0, "other": 1.0, "third": 1.0}, {}])
def test_a_round_without_the_loss_of_every_learner_is_refused(losses):
    built = ledger()
    with pytest.raises(ValueError, match=r"round 4 .*the learners are \['ftml', 'other'\]"):
        built.record(losses)
    assert len(built) == 4
    assert built.cumulative_loss("ftml") == 7.5


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_is_refused_and_changes_no_sum(bad):
    built = ledger()
    with pytest.raises(ValueError, match=r"round 4 .*not finite"):
        built.record({"ftml": 1.0, "other": bad})
    assert [built.cumulative_loss(name) for name in built.learners] == [7.5, 7.5]
    assert len(built) == 4


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
