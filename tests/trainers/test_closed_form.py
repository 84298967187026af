"""The closed-form comparator equals least squares, refresh by refresh, and refuses models without a closed form."""

import functools
from dataclasses import replace

import pytest
import torch
from torch import nn

import online_meta as om
from online_meta.regret.closed_form import Quadratic, minimise, quadratic_of
from tests.trainers.test_hindsight import ROUNDS, TASKS, best_fixed_loss, regression
from trainers.comparators import ComparatorUnavailable, RefreshRequest
from trainers.comparators.closed_form import refresh
from trainers.settings import RegretSettings

REGRET = RegretSettings()


def test_the_closed_form_is_the_exact_minimum():
    found = refresh(regression(TASKS), REGRET, RefreshRequest(ROUNDS), None).comparator
    assert found == om.Comparator("closed_form", ROUNDS, pytest.approx(best_fixed_loss(TASKS), rel=1e-10), 0.0)


def test_a_refresh_continues_from_saved_sums_and_reads_each_round_once():
    accessed, saved = [], None
    setup = regression(TASKS, accessed=accessed)
    for rounds, covered in ((5, 0), (6, 5), (ROUNDS, 6)):
        found = refresh(setup, REGRET, RefreshRequest(rounds, covered), saved)
        saved = found.saved
        assert found.comparator.cumulative_loss == pytest.approx(best_fixed_loss(TASKS[:rounds]), rel=1e-9, abs=1e-12)
    assert accessed == [*range(ROUNDS)]
    again = refresh(setup, REGRET, RefreshRequest(5, 0), saved)
    assert again.comparator.cumulative_loss == pytest.approx(best_fixed_loss(TASKS[:5]), rel=1e-9), (
        "the sum starts over"
    )


def test_skipped_rounds_are_left_out():
    left = [task for round, task in enumerate(TASKS) if round not in (0, 7)]
    found = refresh(regression(TASKS), REGRET, RefreshRequest(ROUNDS, 0, {0, 7}), None).comparator
    assert found.cumulative_loss == pytest.approx(best_fixed_loss(left), rel=1e-10)


def test_a_round_without_a_finite_loss_is_charged_at_the_cap():
    tasks = [om.Task(*(om.Batch(x.float(), y.float()) for x, y in task)) for task in TASKS]
    poison = tasks[0]._replace(query=om.Batch(tasks[0].query.x, tasks[0].query.y + 1e30))
    found = refresh(regression([*tasks, poison]), REGRET, RefreshRequest(ROUNDS + 1), None).comparator
    assert found.cumulative_loss == pytest.approx(best_fixed_loss(TASKS) + REGRET.loss_cap, rel=1e-6)


def test_the_closed_form_differentiates_through_the_adaptation():
    """A comparator that ignored that U_t(w) = w - lr grad depends on w would have another value."""
    exact = refresh(regression(TASKS), REGRET, RefreshRequest(ROUNDS), None).comparator.cumulative_loss
    wrong = regression(TASKS)
    still = om.Inner(wrong.inner.loss, wrong.inner.rule, steps=0)
    assert (
        refresh(replace(wrong, inner=still), REGRET, RefreshRequest(ROUNDS), None).comparator.cumulative_loss
        > 1.1 * exact
    )


def test_several_steps_and_weights_that_do_not_adapt_are_quadratic_too():
    module = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1, bias=False))
    for parameter in module[1].parameters():
        parameter.requires_grad_(False)
    inner = om.Inner(om.model_loss(module, "mse"), om.rules.sgd(lr=0.05), steps=4, fast=("0.weight",))
    start = inner.init(dict(module.double().named_parameters()))
    found = refresh(
        replace(regression(TASKS), inner=inner, start=start), REGRET, RefreshRequest(ROUNDS), None
    ).comparator
    total = functools.reduce(Quadratic.plus, (quadratic_of(inner, start, task) for task in TASKS))
    best = minimise(total).weights.split([value.numel() for value in start.weights.values()])
    meta = om.Meta({n: part.reshape(v.shape) for part, (n, v) in zip(best, start.weights.items(), strict=True)}, {})
    there = [om.exact(inner)(meta, task) for task in TASKS]
    assert found.cumulative_loss == pytest.approx(float(sum(one.loss for one in there)), rel=1e-9)
    for name in start.weights:  # The objective is convex, so this is the minimum.
        assert float(sum(one.grads.weights[name] for one in there).abs().max()) < 1e-7 * found.cumulative_loss


@pytest.mark.parametrize("rounds", [[0, 1, 3, 4], []])
def test_a_discarded_round_makes_the_closed_form_unavailable(rounds):
    setup = regression(TASKS)
    setup.buffer.available = lambda count: rounds
    with pytest.raises(
        ComparatorUnavailable, match=r"retention has taken rounds from 0 on .*lower \[regret\] every_rounds"
    ):
        refresh(setup, REGRET, RefreshRequest(5), None)


def network(*layers, rule=None):
    module = nn.Sequential(*layers).double()
    inner = om.Inner(om.model_loss(module, "mse"), rule or om.rules.sgd(lr=0.1), steps=1)
    return replace(regression(TASKS), inner=inner, start=inner.init(dict(module.named_parameters())))


@pytest.mark.parametrize(
    ("setup", "message"),
    [
        (network(nn.Linear(3, 2), nn.Linear(2, 1)), "round 0: f.* is not quadratic in the weights: .*linear in its we"),
        (network(nn.Linear(3, 1), nn.Tanh()), "not quadratic in the weights"),
        (network(nn.Linear(3, 1), rule=om.rules.meta_sgd(lr=0.1)), r"the inner rule learns \['.*weight'\]"),
        (network(nn.Linear(3, 900), nn.Linear(900, 1)), "4,501 weights; the closed form supports at most 1,000"),
    ],
)
def test_settings_without_a_closed_form_are_refused_with_the_reason(setup, message):
    with pytest.raises(ComparatorUnavailable, match=message):
        refresh(setup, REGRET, RefreshRequest(3), None)


def test_single_precision_tasks_are_computed_in_double_precision():
    single = [om.Task(*(om.Batch(x.float(), y.float()) for x, y in task)) for task in TASKS]
    found = refresh(regression(single), REGRET, RefreshRequest(ROUNDS), None).comparator.cumulative_loss
    assert found == pytest.approx(best_fixed_loss(TASKS), rel=1e-6)
    assert torch.get_default_dtype() == torch.float32
