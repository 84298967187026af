"""Regret on strongly convex quadratics agrees with theory, both in closed form and for the learner itself."""

import math

import numpy as np
import pytest
import torch
from torch import nn

import online_meta as om
from online_meta.replay.all import all
from tests.experiments import regret_theory
from tests.experiments.regret_theory import (
    adapt_all,
    compute_bound_slope,
    compute_expected_slope,
    compute_leaders,
    compute_losses,
    compute_regret,
    draw_quadratics,
    minimise_prefix_sums,
)

WEIGHTS, ROUNDS, SEEDS = 3, 10_000, 10
SHOWN = np.unique(np.geomspace(100, ROUNDS, 40).round().astype(int))
START = np.zeros(WEIGHTS)


@pytest.fixture(scope="module")
def streams():
    found = [draw_quadratics(ROUNDS, WEIGHTS, seed) for seed in range(SEEDS)]
    return [(tasks, adapt_all(tasks)) for tasks in found]


def slope_of(losses, played):
    """Return the slope of the regret over log T, and R^2."""
    slope, _, r_squared = regret_theory.fit_line(np.log(SHOWN), compute_regret(losses, played)[SHOWN - 1])
    return slope, r_squared


def newest_half(losses):
    """Return the leader of only the newer half of the past rounds."""
    curvature, pull = (np.concatenate([[0 * each[0]], each.cumsum(0)]) for each in (losses.curvature, _pull(losses)))
    now = np.arange(1, ROUNDS)
    return np.concatenate([[START], _solve(curvature[now] - curvature[now // 2], pull[now] - pull[now // 2])])


def oldest_half(losses):
    """Return the leader of only the older half of the past rounds."""
    leaders = compute_leaders(losses, START)
    return leaders[(np.arange(ROUNDS) + 1) // 2]


def first_order(tasks, losses):
    """Return the zeros of the sum of first-order meta-gradients, B_t (U_t(w) - b_t)."""
    maps = np.eye(WEIGHTS) - tasks.alpha * tasks.support
    sides = tasks.query @ maps
    pulls = (sides @ losses.minima[..., None])[..., 0]
    return np.concatenate([[START], _solve(sides.cumsum(0), pulls.cumsum(0))[:-1]])


def _pull(losses):
    return (losses.curvature @ losses.minima[..., None])[..., 0]


def _solve(matrices, vectors):
    return np.linalg.solve(matrices, vectors[..., None])[..., 0]


def test_the_loss_after_adaptation_is_the_closed_form_quadratic():
    tasks = draw_quadratics(20, WEIGHTS, 7)
    losses = adapt_all(tasks)
    w = np.random.default_rng(0).standard_normal(WEIGHTS)
    for t, found in enumerate(compute_losses(losses, w)):
        adapted = w - tasks.alpha * tasks.support[t] @ (w - tasks.support_minima[t])
        apart = adapted - tasks.query_minima[t]
        assert found == pytest.approx(0.5 * apart @ tasks.query[t] @ apart, rel=1e-12)
    assert np.linalg.eigvalsh(losses.curvature).min() >= 0.5 / 4
    assert len(np.unique(losses.minima, axis=0)) == 20


def test_no_weights_beat_the_closed_form_in_hindsight(streams):
    losses = streams[0][1]
    cut = type(losses)(*(part[:50] for part in losses))
    leaders = compute_leaders(cut, START)
    least = minimise_prefix_sums(cut)[-1]
    assert compute_losses(cut, leaders[-1]).sum() == pytest.approx(least, rel=1e-12)
    random = np.random.default_rng(1)
    for size in (1e-3, 0.1, 1.0):
        assert compute_losses(cut, leaders[-1] + size * random.standard_normal(WEIGHTS)).sum() > least


def test_ftml_regret_grows_like_log_t_below_the_bound_at_the_expected_rate(streams):
    found = []
    for _, losses in streams:
        played = compute_leaders(losses, START)[:-1]
        slope, r_squared = slope_of(losses, played)
        bound = compute_bound_slope(losses, played)
        assert r_squared > 0.99
        assert 0 < slope < bound
        assert (compute_regret(losses, played) <= bound * (1 + np.log(np.arange(1, ROUNDS + 1)))).all()
        found.append(slope / compute_expected_slope(losses))
    assert math.isclose(sum(found) / SEEDS, 1.0, abs_tol=0.1)


def test_the_regret_of_fixed_weights_grows_like_t(streams):
    for _, losses in streams:
        found = compute_regret(losses, START)[SHOWN - 1]
        slope, _, r_squared = regret_theory.fit_line(SHOWN, found)
        assert r_squared > 0.999
        assert np.ptp(found / SHOWN) < 0.25 * slope


@pytest.mark.parametrize("wrong", [newest_half, oldest_half])
def test_a_leader_of_half_the_past_is_detected(streams, wrong):
    found = [slope_of(losses, wrong(losses))[0] / compute_expected_slope(losses) for _, losses in streams]
    assert sum(found) / SEEDS > 1.5


def test_a_first_order_leader_is_detected(streams):
    grown = []
    for tasks, losses in streams:
        found = compute_regret(losses, first_order(tasks, losses))[[ROUNDS // 10 - 1, -1]]
        grown.append(np.diff(found)[0] / (compute_expected_slope(losses) * math.log(10)))
    assert sum(grown) / SEEDS > 3  # times the growth of the leader's regret over the last nine tenths


def as_task(tasks, t):
    """Return the quadratics of task t as squared errors of a linear model: rows x of a root of A, targets x a."""

    def batch(matrix, minimum):
        rows = np.linalg.cholesky(matrix).T
        return om.Batch(*(torch.from_numpy(part.copy()) for part in (rows, rows @ minimum)))

    support = batch(tasks.support[t], tasks.support_minima[t])
    return om.Task(support, batch(tasks.query[t], tasks.query_minima[t]))


def play(tasks, gradient, steps=20):
    """Follow the leader by many steps; return the learner's losses and its final weights."""
    module = nn.Linear(WEIGHTS, 1, bias=False).double()
    nn.init.zeros_(module.weight)
    loss = om.model_loss(module, lambda output, y: 0.5 * (output[:, 0] - y).square().sum())
    inner = om.Inner(loss, om.rules.sgd(lr=tasks.alpha), 1)
    engine = om.MetaOptimizer(inner.init(dict(module.named_parameters())), "sgd", 1.0)
    learner = om.FollowTheMetaLeader(inner, gradient(inner), engine, replay=all(), steps_per_round=steps)
    losses = []
    for t in range(len(tasks.support)):
        one = as_task(tasks, t)
        losses.append(learner.score(one).loss_after)
        learner.learn(one)
    return np.array(losses), engine.meta().weights["weight"][0].numpy()


def test_the_learner_plays_the_leader_and_has_its_regret():
    tasks = draw_quadratics(6, WEIGHTS, 3)
    losses = adapt_all(tasks)
    leaders = compute_leaders(losses, START)
    suffered, last = play(tasks, om.exact)
    assert suffered == pytest.approx(compute_losses(losses, leaders[:-1]), rel=1e-3)
    assert last == pytest.approx(leaders[-1], abs=1e-3)
    assert suffered.cumsum() - minimise_prefix_sums(losses) == pytest.approx(
        compute_regret(losses, leaders[:-1]), rel=1e-2
    )
    other, _ = play(tasks, om.first_order)
    assert other != pytest.approx(compute_losses(losses, leaders[:-1]), rel=1e-2)


def test_the_rendered_table_reports_whether_the_bound_holds(tmp_path):
    rows = [regret_theory.run_seed(seed, 200) for seed in range(2)]
    text = regret_theory.render({"command": "c", "commit": "d", "wall_seconds": 1.0, "rows": rows})
    assert "within the bound in every round of every stream | yes" in text
    broken = [rows[0], {**rows[1], "kept": False}]
    assert "| NO |" in regret_theory.render({"command": "c", "commit": "d", "wall_seconds": 1.0, "rows": broken})
    assert regret_theory.plot(rows).startswith(b"\x89PNG")
