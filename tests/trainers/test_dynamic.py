"""The dynamic comparator equals each task's own least squares, refresh by refresh and when sampled."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

import online_meta as om
from online_meta.learners import MemoryReplayBuffer
from online_meta.tree import scale
from streams.history.errors import RoundDiscarded
from streams.sources.sinusoid import make_task
from tests.trainers.test_hindsight import ROUNDS, TASKS, best_fixed_loss, losses_only, regression, valley
from trainers.build import build_context, build_learners
from trainers.comparators import RefreshRequest
from trainers.comparators.dynamic import refresh
from trainers.settings import InnerSettings, MetaSettings, ModelSettings, RegretSettings, TrainerSettings

OWN = [best_fixed_loss([task]) for task in TASKS]


def request(rounds, covered=0, skipped=(), warm_start=None):
    return RefreshRequest(rounds, covered, skipped, warm_start)


def regret(steps=200, rounds=100):
    return RegretSettings(dynamic_steps=steps, dynamic_rounds=rounds)


def test_the_estimate_approaches_each_tasks_own_minimum_from_above():
    setup = regression(TASKS)
    found = refresh(setup, regret(), request(ROUNDS), None).comparator
    assert (found.kind, found.as_of_round, found.standard_error) == ("dynamic", ROUNDS, 0.0)
    assert found.cumulative_loss == pytest.approx(sum(OWN), rel=1e-4)
    assert found.cumulative_loss >= sum(OWN) * (1 - 1e-12)
    assert found.cumulative_loss < 0.2 * best_fixed_loss(TASKS), "one solution per task is far better than one for all"


def test_it_settles_only_where_the_loss_has_stopped_falling_and_shows_the_gradient():
    setup = regression(TASKS[:2])
    start, few, many = (refresh(setup, regret(steps), request(2), None).comparator for steps in (0, 1, 100))
    assert (start.settled, few.settled, many.settled) == (False, False, True)
    assert (few.evaluated, many.evaluated) == (2, 2)
    norms = [float(setup.gradient(setup.start, task).grads.weights["weight"].norm()) for task in TASKS[:2]]
    assert start.gradient_norm == pytest.approx(sum(norms) / 2, rel=1e-12)
    assert many.gradient_norm < 1e-3 * start.gradient_norm


def test_it_also_starts_at_the_runs_start():
    """The leader may have moved to where a task's loss cannot be lowered."""
    setup = valley(-2.5)
    leader = om.Meta({"w": torch.tensor(2.5, dtype=torch.float64)}, {})
    found = refresh(setup, regret(), request(3, warm_start=leader), None).comparator
    assert found.cumulative_loss < 3 * 0.11


def test_what_0_1_0_saved_is_continued_as_not_settled():
    saved = {
        name: torch.tensor(value, dtype=torch.float64)
        for name, value in (("total", 2.0), ("variance", 0.0), ("rounds", 3))
    }
    found = refresh(regression(TASKS), regret(), request(5, 3), saved).comparator
    assert (found.settled, found.evaluated) == (False, 2)
    assert found.cumulative_loss > 2.0


def test_900_steps_of_adam_find_no_much_lower_loss_on_sinusoids():
    """On tasks of a small network, against plain Adam from the same leader."""
    model = ModelSettings("trainers.models:mlp", {"inputs": 1, "outputs": 1, "hidden": [16]}, "mse")
    meta = MetaSettings(lr=0.005, steps_per_round=2, batch=4)
    settings = TrainerSettings(model, InnerSettings(steps=2), meta, RegretSettings(baselines=()))
    context = build_context(settings, MemoryReplayBuffer())
    leader = build_learners(settings, context)["ftml"]
    tasks = [make_task(0, t, 10, 10) for t in range(8)]
    lost = 0.0
    for task in tasks:
        lost += leader.score(task).loss_after
        leader.learn(task)
    start = leader.engine.meta()
    own = 0.0
    for task in tasks[:3]:
        engine = om.MetaOptimizer(start, "adam", 0.005)
        losses = []
        for _ in range(900):
            found = context.gradient(engine.meta(), task)
            losses.append(float(found.loss))
            engine.apply(found, 1.0)
        own += min(losses)
    found = refresh(context, regret(100), request(3, warm_start=start), None).comparator
    assert found.cumulative_loss < own + 0.05 * lost
    if found.settled:
        assert found.cumulative_loss < own + 0.03 * lost


def test_more_steps_and_a_warm_start_lower_the_estimate():
    setup = regression(TASKS)
    lost = [refresh(setup, regret(steps), request(ROUNDS), None).comparator.cumulative_loss for steps in (0, 10, 100)]
    assert lost == sorted(lost, reverse=True)
    warm_start = om.Meta({"weight": torch.tensor([[1.0, -2.0, 0.5]], dtype=torch.float64)}, {})
    assert refresh(setup, regret(0), request(ROUNDS, warm_start=warm_start), None).comparator.cumulative_loss < lost[0]
    assert warm_start.weights["weight"].tolist() == [[1.0, -2.0, 0.5]]


def test_learned_rule_parameters_are_optimised_too():
    """A learning rate per weight lowers the query loss further than the weights alone do."""
    setup = regression([TASKS[0]])
    inner = om.Inner(setup.inner.loss, om.rules.meta_sgd(lr=0.1), steps=1)
    learned = replace(setup, inner=inner, gradient=om.exact(inner), start=inner.init(setup.start.weights))
    one, two = (refresh(each, regret(10), request(1), None).comparator.cumulative_loss for each in (setup, learned))
    assert two <= one * (1 + 1e-6)


def test_a_refresh_continues_from_its_saved_state_and_reads_no_round_twice():
    accessed, saved = [], None
    setup = regression(TASKS, accessed=accessed)
    for rounds, covered in ((5, 0), (6, 5), (ROUNDS, 6)):
        found = refresh(setup, regret(30), request(rounds, covered, {2}), saved)
        saved = found.saved
    assert accessed == [round for round in range(ROUNDS) if round != 2]
    whole = refresh(setup, regret(30), request(ROUNDS, 0, {2}), None)
    assert found.comparator.cumulative_loss == pytest.approx(whole.comparator.cumulative_loss, rel=1e-12)


@pytest.mark.parametrize("cut", [0, 11, 40])
def test_the_standard_error_matches_the_spread_of_the_sampling_error(cut):
    errors, standard_errors = [], []
    for seed in range(200):
        losses = torch.randn(40, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) ** 2
        setup, few, saved = losses_only(losses, seed), regret(0, 12), None
        for rounds, covered in ((cut, 0), (40, cut)):
            if rounds > covered:
                found = refresh(setup, few, request(rounds, covered), saved)
                saved = found.saved
        errors.append(found.comparator.cumulative_loss - float(losses.sum()))
        standard_errors.append(found.comparator.standard_error)
    errors, standard_errors = np.array(errors), np.array(standard_errors)
    assert abs(errors.mean()) < 3 * errors.std() / math.sqrt(len(errors)), "the estimate is unbiased"
    assert np.sqrt(np.square(standard_errors).mean()) == pytest.approx(errors.std(), rel=0.2)


def test_a_bad_gradient_never_makes_the_estimate_worse_than_the_start():
    setup = regression(TASKS)
    start = refresh(setup, regret(0), request(ROUNDS), None).comparator.cumulative_loss
    for factor in (-1.0, 1e300, math.nan):
        wild = replace(setup, gradient=lambda meta, task, by=factor: scale(setup.gradient(meta, task), by))
        assert refresh(wild, regret(50), request(ROUNDS), None).comparator.cumulative_loss <= start


def test_a_round_without_a_finite_loss_is_charged_at_the_cap():
    poison = TASKS[3]._replace(query=om.Batch(TASKS[3].query.x, TASKS[3].query.y * 1e200))
    found = refresh(regression([poison]), regret(20), request(1), None).comparator
    assert found.cumulative_loss == RegretSettings().loss_cap


def test_a_refresh_without_available_rounds_raises_round_discarded():
    setup = regression(TASKS)
    setup.buffer.available = lambda count: [0, 1]
    with pytest.raises(RoundDiscarded, match="retention has taken all rounds from 2 to 4"):
        refresh(setup, regret(), request(5, 2), {name: torch.tensor(2.0) for name in ("total", "variance", "rounds")})
    assert refresh(setup, regret(0), request(5), None).comparator.cumulative_loss > 0


def test_a_refresh_stops_when_it_may_not_continue():
    assert refresh(regression(TASKS), regret(), request(ROUNDS), None, lambda: False) is None


def test_within_a_budget_it_optimises_fewer_tasks():
    gradients = []
    setup = regression(TASKS, batch=4)

    def count(meta, task):
        gradients.append(1)
        return setup.gradient(meta, task)

    settings = replace(regret(steps=10), comparator_budget=20.0)
    found = refresh(replace(setup, gradient=count), settings, request(ROUNDS), None).comparator
    assert len(gradients) <= 20 * 4 * ROUNDS
    assert found.evaluated == 20 * 4 * ROUNDS // (10 * 16.25 + 2)
    assert found.standard_error > 0
