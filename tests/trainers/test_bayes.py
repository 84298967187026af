"""Regret against the exact Bayes predictor: 0 for a learner that answers by it, and above 0 for every other one."""

import math
from dataclasses import replace

import numpy as np
import pytest

import online_meta as om
from online_meta.regret.scoring import answer_task, score_answers
from streams.sources import ambiguous_functions, gp_regression, linear_gaussian
from tests.trainers.test_hindsight import regression
from trainers.build import build_context
from trainers.comparators import ComparatorUnavailable, RefreshRequest
from trainers.comparators.bayes import check, find_bayes_loss, load_oracle, refresh
from trainers.settings import ModelSettings, RegretSettings, TrainerSettings

REGRET = RegretSettings()
SOURCES = {
    "linear_gaussian": linear_gaussian,
    "gp_regression": gp_regression,
    "ambiguous_functions": ambiguous_functions,
}


def tasks(kind, rounds, **options):
    source = SOURCES[kind]
    return [source.make_task(source.Settings(**options), 3, t) for t in range(rounds)]


def losses(predict, tasks):
    """Return what a learner loses that answers so, as a run scores it."""

    def answers(state, support, x):
        return {"": predict(support, x)}

    return np.array([score_answers(answer_task(answers, {}, task), task)[""].loss_after for task in tasks])


def ask(tasks, kind, saved=None, request=None, accessed=None, **options):
    context = regression(tasks, accessed=accessed)
    return refresh(context, REGRET, request or RefreshRequest(len(tasks)), saved, source=kind, options=options)


@pytest.mark.parametrize("kind", SOURCES)
def test_a_learner_that_answers_by_the_oracle_has_no_regret_and_others_have_some(kind):
    source, rounds = SOURCES[kind], 20 if kind == "ambiguous_functions" else 60
    played = tasks(kind, rounds)
    settings = source.Settings()
    comparator = ask(played, kind).comparator
    assert comparator == om.Comparator("bayes", rounds, pytest.approx(comparator.cumulative_loss), 0.0)
    exact = losses(source.oracle(settings), played)
    assert exact.sum() == pytest.approx(comparator.cumulative_loss, abs=1e-9 * rounds)
    for noise in (0.5 * settings.noise, 2 * settings.noise):
        wrong = source.oracle(replace(settings, noise=noise))
        regret = np.array([find_bayes_loss(wrong, task) for task in played]) - exact
        assert regret.sum() > 3 * regret.std() * math.sqrt(rounds), "another answer loses more"


def test_the_width_of_the_prior_counts():
    """Few samples leave the prior its say: a learner that believes in another one loses more."""
    settings = linear_gaussian.Settings(support=1)
    played = tasks("linear_gaussian", 150, support=1)
    exact = losses(linear_gaussian.oracle(settings), played)
    assert exact.sum() == pytest.approx(ask(played, "linear_gaussian", support=1).comparator.cumulative_loss, rel=1e-12)
    for width in (0.25, 4.0):
        wrong = linear_gaussian.oracle(replace(settings, covariance=((width, 0.0), (0.0, width))))
        regret = np.array([find_bayes_loss(wrong, task) for task in played]) - exact
        assert regret.sum() > 3 * regret.std() * math.sqrt(len(played))


def test_a_refresh_continues_from_its_sum_and_reads_each_round_once():
    played, accessed = tasks("gp_regression", 9), []
    each = [find_bayes_loss(load_oracle("gp_regression", {}), task) for task in played]
    saved = None
    for rounds in (4, 5, 9):
        found = ask(played, "gp_regression", saved, RefreshRequest(rounds, skipped={2}), accessed)
        saved = found.saved
        assert found.comparator.cumulative_loss == pytest.approx(sum(each[:rounds]) - each[2], rel=1e-12)
    assert accessed == [0, 1, *range(3, 9)]
    again = ask(played, "gp_regression", saved, RefreshRequest(4))
    assert again.comparator.cumulative_loss == pytest.approx(sum(each[:4]), rel=1e-12), "rounds are played again"
    other = ask(played, "gp_regression", saved, RefreshRequest(9), noise=0.2)
    assert other.comparator == ask(played, "gp_regression", noise=0.2).comparator, "other options begin anew"


def test_a_loss_that_is_not_finite_is_charged_at_the_cap():
    played = tasks("linear_gaussian", 3)
    poison = played[0]._replace(query=om.Batch(played[0].query.x.double(), played[0].query.y.double() + 1e60))
    without = ask(played, "linear_gaussian").comparator.cumulative_loss
    found = ask([*played, poison], "linear_gaussian").comparator.cumulative_loss
    assert found == pytest.approx(without + REGRET.loss_cap)


def test_a_round_that_is_gone_or_has_no_exact_answer_ends_it():
    played = tasks("linear_gaussian", 4)
    context = regression(played)
    context.buffer.available = lambda count: [0, 2, 3]
    with pytest.raises(ComparatorUnavailable, match="retention has taken rounds from 0 on"):
        refresh(context, REGRET, RefreshRequest(4), None, source="linear_gaussian")
    wide = om.Task(*(om.Batch(batch.x.expand(-1, 3), batch.y) for batch in played[0]))
    with pytest.raises(ComparatorUnavailable, match=r"round 1: x of the support set has shape \(10, 3\)"):
        ask([played[0], wide], "linear_gaussian")
    with pytest.raises(ComparatorUnavailable, match="those that have them are ambiguous_functions, gp_regression, lin"):
        ask(played, "http")


@pytest.mark.parametrize(
    ("loss", "source", "options", "message"),
    [
        ("gaussian_of_noise", "", {}, r"set source in \[regret.comparator_options.bayes\], one of ambiguous_functions"),
        ("gaussian_of_noise", "sinusoid", {}, "'sinusoid' in .* has no exact answers; those that have"),
        ("gaussian_of_noise", "gp_regresion", {}, "did you mean 'gp_regression'"),
        ("gaussian_of_noise", "gp_regression", {"nois": 1.0}, "have no key 'nois': did you mean 'noise'"),
        ("gaussian_of_noise", "gp_regression", {"noise": -1.0}, "noise: Input should be greater than 0"),
        ("gaussian_of_noise", "ambiguous_functions", {"noise": 0.01}, "take more noise or fewer samples"),
        ("gaussian_of_noise", "linear_gaussian", {"mean": [0.0] * 3, "covariance": [[0.0] * 3] * 3}, "have \\(n, 2\\)"),
        ("mse", "gp_regression", {}, "in nats, and that of the run is not: use .* 'gaussian' or 'gaussian_of_noise'"),
    ],
)
def test_what_has_no_exact_answer_is_refused_with_the_reason(loss, source, options, message):
    model = ModelSettings("trainers.models:mlp", {"inputs": 1, "outputs": 1, "hidden": [4]}, loss)
    played = tasks("gp_regression", 1)
    context = build_context(TrainerSettings(model), regression(played).buffer)
    with pytest.raises(ValueError, match=message):
        check(context, played[0], source, options)
