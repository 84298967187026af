"""What answers share is prepared when a leader is published, and in no request."""

import os
import threading
from pathlib import Path

import pytest
import torch

from deploy.leader import Adapter
from online_meta.types import State
from tests.learners.estimators import FITS
from tests.support.ingesting import until
from tests.support.runs import SETTINGS, changed, task
from trainers.build import build_answering_learner
from trainers.journal.leader_file import encode_leader
from trainers.settings import TrainerSettings

OPTIONS = {"estimator": "tests.learners.estimators:RecordedShares", "scope": "pooled"}
TASK = task(9)


def of_scope(scope: str) -> TrainerSettings:
    run = changed(SETTINGS, regret={"baselines": ("sklearn",), "options": {"sklearn": {**OPTIONS, "scope": scope}}})
    return TrainerSettings(**{**vars(run), "answers": "sklearn"})


def publish(path: Path, state: State, rounds: int) -> None:
    path.with_suffix(".new").write_bytes(encode_leader(state, rounds, learner="sklearn"))
    os.replace(path.with_suffix(".new"), path)


def learn_rounds(settings: TrainerSettings, rounds: int) -> list[State]:
    """Return what the learner publishes after each round."""
    learner, states = build_answering_learner(settings, []).learner, []  # type: ignore[arg-type]
    for round in range(rounds):
        one = task(round)
        learner.score(one)
        learner.learn(one)
        states.append(learner.state())
    return states


def test_a_request_waits_for_no_fit_but_the_first(tmp_path: Path) -> None:
    settings, path = of_scope("pooled"), tmp_path / "leader.safetensors"
    states = learn_rounds(settings, 3)
    adapter = Adapter(settings, path)
    with pytest.raises(FileNotFoundError):
        adapter.predict(TASK.support, TASK.query.x)
    publish(path, states[0], 1)
    assert adapter.predict(TASK.support, TASK.query.x)[1] == 1
    for rounds, state in enumerate(states[1:], 2):
        FITS.clear()
        publish(path, state, rounds)
        until(lambda rounds=rounds: adapter.leader().round == rounds)
        assert [fit[3] for fit in FITS] == ["follow-leader"]
        found, answered, _ = adapter.predict(TASK.support, TASK.query.x)
        assert answered == rounds
        assert [fit[3] for fit in FITS] == ["follow-leader"], "the request fits nothing"
        right = build_answering_learner(settings, []).answer(state, TASK.support, TASK.query.x)  # type: ignore[arg-type]
        assert torch.equal(found[0].outputs, right[0].outputs)  # type: ignore[arg-type]


def test_there_is_no_thread_where_nothing_is_to_be_prepared(tmp_path: Path) -> None:
    before = {*threading.enumerate()}
    adapter = Adapter(of_scope("task"), tmp_path / "leader.safetensors")
    assert not {*threading.enumerate()} - before
    publish(tmp_path / "leader.safetensors", learn_rounds(of_scope("task"), 1)[0], 1)
    assert adapter.leader().round == 1


def test_the_thread_ends_with_its_adapter(tmp_path: Path) -> None:
    before = {*threading.enumerate()}
    adapter = Adapter(of_scope("pooled"), tmp_path / "leader.safetensors")
    (own,) = {*threading.enumerate()} - before
    del adapter
    own.join(200)
    assert not own.is_alive()
