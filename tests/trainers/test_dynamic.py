"""The dynamic comparator: against each task's own least squares, refresh by refresh, and sampled."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

import online_meta as om
from online_meta.tree import scale
from streams.history.errors import RoundDiscarded
from tests.trainers.test_hindsight import ROUNDS, TASKS, best_fixed_loss, losses_only, regression
from trainers.comparators import RefreshRequest
from trainers.comparators.dynamic import refresh
from trainers.settings import RegretSettings

OWN = [best_fixed_loss([task]) for task in TASKS]


def asked(rounds, covered=0, skipped=(), warm_start=None):
    return RefreshRequest(rounds, covered, skipped, warm_start)


def regret(steps=2000, rounds=100):
    return RegretSettings(dynamic_steps=steps, dynamic_rounds=rounds)


def test_the_estimate_is_each_tasks_own_minimum_from_above():
    setup = regression(TASKS)
    found = refresh(setup, regret(), asked(ROUNDS), None).comparator
    assert (found.kind, found.as_of_round, found.standard_error) == ("dynamic", ROUNDS, 0.0)
    assert found.cumulative_loss == pytest.approx(sum(OWN), rel=1e-4)
    assert found.cumulative_loss >= sum(OWN) * (1 - 1e-12)
    assert found.cumulative_loss < 0.2 * best_fixed_loss(TASKS), "one for all is another thing than each its own"


def test_more_steps_come_nearer_and_so_does_a_start_that_is_near():
    setup = regression(TASKS)
    lost = [refresh(setup, regret(steps), asked(ROUNDS), None).comparator.cumulative_loss for steps in (0, 10, 100)]
    assert lost == sorted(lost, reverse=True)
    warm_start = om.Meta({"weight": torch.tensor([[1.0, -2.0, 0.5]], dtype=torch.float64)}, {})
    assert refresh(setup, regret(0), asked(ROUNDS, warm_start=warm_start), None).comparator.cumulative_loss < lost[0]
    assert warm_start.weights["weight"].tolist() == [[1.0, -2.0, 0.5]]


def test_a_learned_rule_is_part_of_what_is_best():
    """With a learning rate for each weight the query's loss comes down further than by weights alone."""
    setup = regression([TASKS[0]])
    inner = om.Inner(setup.inner.loss, om.rules.meta_sgd(lr=0.1), steps=1)
    learned = replace(setup, inner=inner, gradient=om.exact(inner), start=inner.init(setup.start.weights))
    one, two = (refresh(each, regret(10), asked(1), None).comparator.cumulative_loss for each in (setup, learned))
    assert two <= one * (1 + 1e-6)


def test_it_goes_on_from_what_was_saved_and_looks_at_no_round_twice():
    accessed, saved = [], None
    setup = regression(TASKS, accessed=accessed)
    for rounds, covered in ((5, 0), (6, 5), (ROUNDS, 6)):
        found = refresh(setup, regret(30), asked(rounds, covered, {2}), saved)
        saved = found.saved
    assert accessed == [round for round in range(ROUNDS) if round != 2]
    whole = refresh(setup, regret(30), asked(ROUNDS, 0, {2}), None)
    assert found.comparator.cumulative_loss == pytest.approx(whole.comparator.cumulative_loss, rel=1e-12)


@pytest.mark.parametrize("cut", [0, 11, 40])
def test_the_standard_error_covers_what_was_not_looked_at(cut):
    errors, told = [], []
    for seed in range(200):
        losses = torch.randn(40, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) ** 2
        setup, few, saved = losses_only(losses, seed), regret(0, 12), None
        for rounds, covered in ((cut, 0), (40, cut)):
            if rounds > covered:
                found = refresh(setup, few, asked(rounds, covered), saved)
                saved = found.saved
        errors.append(found.comparator.cumulative_loss - float(losses.sum()))
        told.append(found.comparator.standard_error)
    errors, told = np.array(errors), np.array(told)
    assert abs(errors.mean()) < 3 * errors.std() / math.sqrt(len(errors)), "it is unbiased"
    assert np.sqrt(np.square(told).mean()) == pytest.approx(errors.std(), rel=0.2)


def test_a_gradient_that_leads_astray_ends_the_search_at_the_best_that_was_found():
    setup = regression(TASKS)
    start = refresh(setup, regret(0), asked(ROUNDS), None).comparator.cumulative_loss
    for factor in (-1.0, 1e300, math.nan):
        wild = replace(setup, gradient=lambda meta, task, by=factor: scale(setup.gradient(meta, task), by))
        assert refresh(wild, regret(50), asked(ROUNDS), None).comparator.cumulative_loss <= start


def test_without_any_round_that_is_kept_it_waits_for_newer_ones():
    setup = regression(TASKS)
    setup.buffer.available = lambda count: [0, 1]
    with pytest.raises(RoundDiscarded, match="retention has taken all rounds from 2 to 4"):
        refresh(setup, regret(), asked(5, 2), {name: torch.tensor(2.0) for name in ("total", "variance", "rounds")})
    assert refresh(setup, regret(0), asked(5), None).comparator.cumulative_loss > 0


def test_it_stops_as_soon_as_it_may_not_proceed():
    assert refresh(regression(TASKS), regret(), asked(ROUNDS), None, lambda: False) is None
