"""A learner made of two pure functions."""

import math

import pytest
import torch

from online_meta.answers import believe_by_inner_loop, pack_meta, unpack_meta
from online_meta.learners import FunctionalLearner
from online_meta.testing.learner_problems import frozen, setup, stream


def make(update):
    context = setup()

    def believe(state, support):
        return believe_by_inner_loop(context.inner, unpack_meta(state), support)

    return FunctionalLearner(context.inner, pack_meta(context.start), believe, update)


def quarter(state, task, round):
    return {name: value / 4 for name, value in state.items()}


def add_round(state, task, round):
    return {name: value + round for name, value in state.items()}


def play(learner, tasks):
    return [(learner.score(task), learner.learn(task)) for task in tasks]


def test_each_round_updates_the_state_and_reports_the_norm_of_the_change():
    learner = make(quarter)
    before = learner.state()
    played = play(learner, stream(2))
    assert frozen(learner.state()) == frozen({name: value / 16 for name, value in before.items()})
    norm = math.sqrt(sum(float(value.square().sum()) for value in before.values()))
    assert [learned.steps[0].norm for _, learned in played] == pytest.approx([norm * 3 / 4, norm * 3 / 16], rel=1e-12)
    assert {step.skipped for _, learned in played for step in learned.steps} == {None}


def test_tasks_that_are_learned_together_are_rounds_of_their_own():
    learner, tasks = make(add_round), stream(3)
    before = learner.state()
    for task in tasks:
        learner.score(task)
    learner.learn(*tasks)
    assert frozen(learner.state()) == frozen({name: value + 0 + 1 + 2 for name, value in before.items()})


def test_an_update_that_is_not_finite_changes_nothing_but_counts_as_a_round():
    learner = make(lambda state, task, round: {name: value + (math.nan, 1.0)[round] for name, value in state.items()})
    before, tasks = learner.state(), stream(2)
    assert [step.skipped for step in play(learner, tasks[:1])[0][1].steps] == ["not_finite"]
    assert frozen(learner.state()) == frozen(before)
    assert [step.skipped for step in play(learner, tasks[1:])[0][1].steps] == [None]
    assert frozen(learner.state()) == frozen({name: value + 1.0 for name, value in before.items()})


@pytest.mark.parametrize(
    ("update", "message"),
    [
        (lambda state, task, round: {"0.bias": state["0.bias"]}, "update returns .*0.bias"),
        (lambda state, task, round: {name: value[None] for name, value in state.items()}, "update returns .*1, 4"),
        (lambda state, task, round: {name: value.float() for name, value in state.items()}, "float32.*float64"),
    ],
)
def test_an_update_keeps_names_shapes_and_dtypes(update, message):
    learner, (task,) = make(update), stream(1)
    learner.score(task)
    with pytest.raises(ValueError, match=message):
        learner.learn(task)


def test_a_learner_without_an_update_learns_nothing():
    learner = make(None)
    before = frozen(learner.save())
    assert [learned.steps for _, learned in play(learner, stream(2))] == [(), ()]
    assert frozen(learner.save()) == before
    assert all(not value.requires_grad and torch.isfinite(value).all() for value in learner.state().values())
