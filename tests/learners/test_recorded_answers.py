"""What a learner answers to a scored task is recorded, and keeps its bits."""

import pytest
import torch
from torch.utils._pytree import tree_leaves

from online_meta.functional import recording
from online_meta.learners.ftml import FollowTheMetaLeader
from online_meta.regret.scoring import ScoredLearner, score_answers
from online_meta.testing.learner_problems import stream_for
from online_meta.testing.test_learners import NAMES, make


def dump(leaf: object) -> bytes | None:
    return leaf.numpy().tobytes() if isinstance(leaf, torch.Tensor) else None


@pytest.mark.parametrize("name", NAMES)
def test_recorded_answers_have_the_bits_of_answers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording, "RECORD_AFTER_SECONDS", 0.0)
    recorded, plain = make(name), make(name)
    monkeypatch.setattr(plain, "draws_numbers", lambda: True, raising=False)
    for task in stream_for(name, 9):
        found, own = (one.answer_task(task, (2,)) for one in (recorded, plain))
        assert score_answers(found, task) == score_answers(own, task)
        assert [*map(dump, tree_leaves(found))] == [*map(dump, tree_leaves(own))]
        assert recorded.learn(task) == plain.learn(task)


def test_an_inner_loop_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording, "RECORD_AFTER_SECONDS", 0.0)
    learner = make("ftml")
    assert isinstance(learner, FollowTheMetaLeader)
    called = []
    answers = learner.believe
    monkeypatch.setattr(learner, "believe", lambda *args: called.append(args) or answers(*args))
    for task in stream_for("ftml", 9):
        learner.answer_task(task)
        learner.learn(task)
    before_and_after = 2
    assert len(called) == before_and_after * (2 + recording.COMPARED_CALLS + 1), "once more to be recorded"


def test_answers_that_draw_torchs_numbers_are_not_recorded() -> None:
    learner = make("ftml")
    assert isinstance(learner, ScoredLearner)
    assert not learner.draws_numbers()
