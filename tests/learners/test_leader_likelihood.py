"""The likelihood from the adapted leader's loss, against explicit adaptation and densities from scipy."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_t

import online_meta as om
from online_meta.answers import bind_meta
from online_meta.changepoints.detectors.run_length import run_length
from online_meta.changepoints.leader_likelihood import leader_likelihood, measure_errors
from online_meta.changepoints.segments import segment_samples
from online_meta.testing import learner_problems as problems
from online_meta.types import Batch

INNER = om.Inner(om.model_loss(problems.net(), "mse"), om.rules.meta_sgd(lr=0.05), 2)
META = INNER.init(problems.weights_of(problems.net()))
TASK = problems.task(0, support=9)
ERRORS = [2.0, 1.5, 1.0, 0.5]


def leading(inner, meta):
    """Return what ``leader_likelihood`` needs to know of a leader: how it adapts, and its loss."""
    return bind_meta(inner, meta), inner.loss


def build(**options):
    return leader_likelihood(
        *leading(INNER, META), TASK.support.x[0], TASK.support.y[0], **{"sizes": (1, 2, 4), "errors": ERRORS, **options}
    )


def observe(likelihood, count, first=0):
    runs = likelihood.start()
    for at in range(first, first + count):
        runs = likelihood.update(runs, TASK.support.x[at], TASK.support.y[at])
    return runs


def loss_after(size, x, y, first=0):
    """Return the loss of one sample after adaptation to ``size`` support samples."""
    support = Batch(*(values[first : first + size] for values in TASK.support))
    weights = INNER.adapt(META, support) if size else META.weights
    return float(INNER.loss(weights, Batch(x[None], y[None])))


@pytest.mark.parametrize(("count", "size"), [(0, 0), (1, 1), (2, 2), (3, 2), (4, 4), (8, 4)])
def test_a_run_adapts_to_its_first_samples_in_steps_of_size(count, size):
    """Without errors, the loss is a negative log-likelihood and is used unchanged."""
    likelihood = build(errors=None)
    x, y = TASK.query.x[0], TASK.query.y[0]
    found = float(likelihood.score(observe(likelihood, count), x, y))
    assert found == pytest.approx(-loss_after(size, x, y), rel=1e-9)


def test_mean_square_errors_have_a_joint_student_t_density():
    """All errors of a run, each scaled by its expected error, have a multivariate Student-t density."""
    likelihood, shape = build(shape=1.5), 1.5
    runs, total, units, scales = likelihood.start(), 0.0, [], []
    for count in range(8):
        x, y = TASK.support.x[count], TASK.support.y[count]
        size = (0, 1, 2, 2, 4, 4, 4, 4)[count]
        level = ERRORS[(0, 1, 2, 4).index(size)]
        total += float(likelihood.score(runs, x, y))
        runs = likelihood.update(runs, x, y)
        # A point of two numbers whose distance from the prediction has the given loss, in any direction.
        units += [math.sqrt(2 * loss_after(size, x, y)), 0.0]
        scales += [level, level]
    found = multivariate_t.logpdf(np.array(units), np.zeros(16), np.diag(scales), df=2 * shape)
    assert total == pytest.approx(float(found), rel=1e-9)


def test_stacked_runs_are_independent():
    likelihood = build()
    x, y = TASK.support.x[8], TASK.support.y[8]
    long, short = observe(likelihood, 8), observe(likelihood, 2, first=6)
    stack = {name: torch.cat([values, short[name]]) for name, values in long.items()}
    alone = torch.cat([likelihood.score(runs, x, y) for runs in (long, short)])
    torch.testing.assert_close(likelihood.score(stack, x, y), alone, rtol=1e-9, atol=0)
    before = {name: values.clone() for name, values in stack.items()}
    again = likelihood.update(stack, x, y)
    for name, values in likelihood.update(short, x, y).items():
        torch.testing.assert_close(again[name][1:], values, rtol=1e-9, atol=1e-12)
    assert all(torch.equal(before[name], stack[name]) for name in before), "update does not modify its input"


def test_expected_errors_are_the_mean_query_losses():
    tasks = [problems.task(seed) for seed in range(3)]
    found = measure_errors(INNER, META, tasks, (1, 3))
    for place, size in enumerate((0, 1, 3)):
        losses = []
        for task in tasks:
            support = Batch(task.support.x[:size], task.support.y[:size])
            weights = INNER.adapt(META, support) if size else META.weights
            losses.append(float(INNER.loss(weights, task.query)))
        assert found[place] == pytest.approx(sum(losses) / 3)
    with pytest.raises(ValueError, match="5 support samples"):
        measure_errors(INNER, META, tasks, (5,))


def test_changes_of_the_task_are_detected():
    inner = om.Inner(INNER.loss, om.rules.sgd(lr=0.1), 10)
    meta = inner.init(problems.weights_of(problems.net()))
    tasks = [problems.task(seed, support=20) for seed in range(3)]
    sizes = (1, 2, 4, 8)
    errors = measure_errors(inner, meta, [problems.task(seed, support=8) for seed in range(10, 20)], sizes)
    samples = [pair for task in tasks for pair in zip(*task.support, strict=True)]
    likelihood = leader_likelihood(*leading(inner, meta), *samples[0], sizes=sizes, errors=errors)
    segments = list(segment_samples(run_length(likelihood, hypotheses=8), samples, 1000))
    assert [segment.end for segment in segments] == pytest.approx([20, 40, 60], abs=3)


def test_a_run_whose_adaptation_diverged_is_improbable_but_not_nan():
    inner = om.Inner(INNER.loss, om.rules.sgd(lr=1e200), 3)
    likelihood = leader_likelihood(
        *leading(inner, META), TASK.support.x[0], TASK.support.y[0], sizes=(1, 2, 4), errors=ERRORS
    )
    runs, scores = likelihood.start(), []
    for x, y in zip(*TASK.support, strict=True):
        scores.append(float(likelihood.score(runs, x, y)))
        runs = likelihood.update(runs, x, y)
    assert not any(map(math.isnan, scores))
    assert max(scores[1:3]) < -50 < scores[0]
    samples = [*zip(*problems.task(1, support=30).support, strict=True)]
    assert len([*segment_samples(run_length(likelihood, hypotheses=4), samples, 1000)]) >= 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sizes": ()}, "sizes are"),
        ({"sizes": (0, 1)}, "sizes are"),
        ({"sizes": (2, 1, 4)}, "sizes are"),
        ({"errors": [1.0]}, "errors are"),
        ({"errors": [1.0, 1.0, 0.0, 1.0]}, "errors are"),
        ({"shape": 0.0}, "shape is 0.0"),
    ],
)
def test_invalid_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)
