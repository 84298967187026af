"""What a learner answers to a scored task is recorded, and keeps its bits."""

import math

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

import online_meta as om
from online_meta.functional import recording
from online_meta.inner import AnswerRule, draws_numbers
from online_meta.learners.ftml import FollowTheMetaLeader
from online_meta.regret.scoring import score_answers
from online_meta.testing.learner_problems import net, stream_for
from online_meta.testing.test_learners import NAMES, make
from online_meta.types import InnerRule


def dump(leaf: object) -> bytes | None:
    return leaf.numpy().tobytes() if isinstance(leaf, torch.Tensor) else None


@pytest.mark.parametrize("name", [name for name in NAMES if name != "pool"])  # It mixes recorded answers.
def test_recorded_answers_have_the_bits_of_answers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording, "RECORD_AFTER_CALLS", 2)
    recorded, plain = make(name), make(name)
    monkeypatch.setattr(plain, "draws_numbers", lambda: True, raising=False)
    for task in stream_for(name, 9):
        found, own = (one.answer_task(task, (2,)) for one in (recorded, plain))
        assert score_answers(found, task) == score_answers(own, task)
        assert [*map(dump, tree_leaves(found))] == [*map(dump, tree_leaves(own))]
        assert recorded.learn(task) == plain.learn(task)


def test_an_inner_loop_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording, "RECORD_AFTER_CALLS", 2)
    monkeypatch.setattr(recording, "SLOW_OPERATION", math.inf)
    learner = make("ftml")
    assert isinstance(learner, FollowTheMetaLeader)
    called = []
    answers = learner.believe
    monkeypatch.setattr(learner, "believe", lambda *args: called.append(args) or answers(*args))
    counts = []
    for task in stream_for("ftml", 9):
        learner.answer_task(task)
        learner.learn(task)
        counts.append(len(called))
    last = 2 + recording.COMPARED_CALLS
    assert counts[last - 1] > counts[last - 2], "the last comparison calls the function"
    assert counts[last - 1] == counts[-1], "and then nothing does"


@pytest.mark.parametrize("rule", [om.rules.sgd(lr=0.1), om.rules.sgd(lr=0.1)._replace(random="keyed")])
def test_answers_by_rules_without_torchs_numbers_may_be_recorded(rule: InnerRule) -> None:
    assert not draws_numbers(om.Inner(om.model_loss(net(), "mse"), rule, 2))


def test_answers_that_draw_torchs_numbers_are_not_recorded() -> None:
    loss, drawing = om.model_loss(net(), "mse"), om.rules.sgd(lr=0.1)._replace(random=True)
    assert draws_numbers(om.Inner(loss, drawing, 2))
    assert draws_numbers(om.Inner(loss, om.rules.sgd(lr=0.1), 2, answer_rules=(AnswerRule("other", drawing, (1,)),)))
    assert draws_numbers(om.Inner(om.model_loss(nn.Sequential(net(), nn.Dropout()), "mse"), om.rules.sgd(lr=0.1), 2))
