"""A task with finite numbers and a gradient that is not finite is left out of every step that revisits it."""

import math

import pytest
import torch

import online_meta as om
from online_meta.batching.task_sum import TaskSum, sum_skipping_nonfinite, sum_with_measurements
from online_meta.learners import ftml, train_on_everything
from online_meta.replay import ReplayPolicy, ReplaySample
from online_meta.replay.all import all as every_round
from online_meta.testing.compare import assert_close
from online_meta.testing.learner_problems import frozen, setup, stream


def poison(part="support"):
    """Return a task that ingest accepts and that overflows in the loss."""
    (task,) = stream(1, seed=99)
    batch = getattr(task, part)
    return task._replace(**{part: batch._replace(y=batch.y * 1e200)})


def play(learner, tasks):
    return [(learner.score(task), learner.learn(task)) for task in tasks]


@pytest.mark.parametrize("part", ["support", "query"])
@pytest.mark.parametrize("build", [ftml.build, train_on_everything.build])
def test_the_other_tasks_are_learned_as_without_the_poison_task(build, part):
    good = stream(4)
    tasks = [*good[:2], poison(part), *good[2:]]
    poisoned = build(setup(replay=every_round()))
    played = play(poisoned, tasks)
    assert not math.isfinite(played[2][0].loss_before + played[2][0].loss_after) or build is not ftml.build
    assert {step.skipped for _, learned in played for step in learned.steps} == {None}

    clean = build(
        setup(
            replay=ReplayPolicy(lambda memory, request: [ReplaySample(round) for round in request.rounds if round != 2])
        )
    )
    play(clean, tasks)
    assert_close(poisoned.engine.meta().weights, clean.engine.meta().weights, 1e-12)


def test_a_step_on_poison_tasks_only_is_skipped_and_reported():
    learner, fresh = ftml.build(setup()), ftml.build(setup())
    played = play(learner, [poison()])
    assert [step.skipped for step in played[0][1].steps] == ["not_finite"] * 2
    assert frozen(learner.save()) == frozen(fresh.save())


def gradient_and_meta():
    made = setup()
    return made.gradient, made.start


def test_finite_tasks_have_the_plain_sum_bit_for_bit():
    gradient, meta = gradient_and_meta()
    tasks, weights = stream(3), [1.0, 2.5, 0.25]
    found, share = sum_skipping_nonfinite(TaskSum(gradient))(
        meta, tasks, [ReplaySample(0, weight, 0.5) for weight in weights]
    )
    right = TaskSum(gradient)(meta, tasks, weights)
    assert frozen(found.grads.weights) == frozen(right.grads.weights)
    assert torch.equal(found.loss, right.loss)
    assert share == 1.5


@pytest.mark.parametrize("way", ["together", "measured"])
def test_a_poison_task_is_removed_together_with_its_share(way):
    gradient, meta = gradient_and_meta()
    first, last = stream(2)
    measured = []
    one_by_one = sum_with_measurements(gradient, lambda found: found.loss.reshape(1), measured.append)
    summed = sum_skipping_nonfinite(TaskSum(gradient)) if way == "together" else one_by_one
    samples = [ReplaySample(0, 1.0, 2.0), ReplaySample(1, 7.0, 3.0), ReplaySample(2, 2.5, 1.0)]
    found, share = summed(meta, [first, poison(), last], samples)
    right = TaskSum(gradient)(meta, [first, last], [1.0, 2.5])
    assert share == 3.0
    if way == "measured":
        assert [measured[0], measured[2]] == [[float(gradient(meta, task).loss)] for task in (first, last)]
        assert math.isnan(measured[1][0])
    assert_close(found.grads.weights, right.grads.weights, 1e-15)
    torch.testing.assert_close(found.loss, right.loss, rtol=1e-15, atol=0)


def test_a_task_with_a_finite_loss_and_a_nonfinite_gradient_is_removed():
    gradient, meta = gradient_and_meta()
    (task,) = stream(1)

    def spoilt(meta, task):
        found = gradient(meta, task)
        name = next(iter(found.grads.weights))
        weights = {**found.grads.weights, name: found.grads.weights[name] * torch.nan}
        return om.MetaGrad(found.loss, om.Meta(weights, {}))

    found, share = sum_skipping_nonfinite(TaskSum(spoilt))(meta, [task], [ReplaySample(0)])
    assert share == 0
    assert not any(value.any() for value in found.grads.weights.values())


def test_without_tasks_the_sum_and_the_share_are_zero():
    gradient, meta = gradient_and_meta()
    found, share = sum_skipping_nonfinite(TaskSum(gradient))(meta, [], [])
    assert share == 0
    assert found.loss == 0
    assert {name: value.shape for name, value in found.grads.weights.items()} == {
        name: value.shape for name, value in meta.weights.items()
    }
    assert not any(value.any() for value in found.grads.weights.values())
