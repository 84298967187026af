"""The learner that answers gives the same answers from recorded programs, to the bit."""

import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from deploy.config.config import read_config
from deploy.predictions import encode_predictions
from online_meta.functional import recording
from online_meta.functional.recording import COMPARED_CALLS, Recorder
from online_meta.learners import MemoryReplayBuffer
from streams.sources.sinusoid import make_task
from tests.support.daemon import sinusoid_config
from trainers import build
from trainers.build import build_answering_learner

POOL = 'baselines = ["from_scratch", "ridge_head", "constant"]\noptions.from_scratch = { steps = 3 }\n'
RUNS = {
    "one learner": "[inner]\nsteps = 2\n[regret]\nbaselines = []\n",
    "the pool": f"[inner]\nsteps = 2\n[regret]\n{POOL}",
    "weights that are drawn": f'[inner]\nsteps = 2\n[regret]\n{POOL}[serve]\nanswers = "from_scratch"\n',
    "weights that are drawn by key": (
        '[inner]\nsteps = 2\nbegin = "fresh"\nposterior = "samples"\nsamples = 2\n[regret]\nbaselines = []\n'
    ),
}


@pytest.mark.parametrize("name", RUNS)
def test_recorded_answers_are_the_same(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording, "RECORD_AFTER_CALLS", 2)
    monkeypatch.setattr(build, "SLOW_ANSWER", math.inf)
    recorders: list[Recorder[..., Any]] = []
    original = Recorder.__init__

    def note(self: Recorder[..., Any], *args: Any, **options: Any) -> None:
        original(self, *args, **options)
        if options.get("executor"):
            recorders.append(self)

    monkeypatch.setattr(Recorder, "__init__", note)
    path = tmp_path / "config.toml"
    path.write_text(sinusoid_config(tmp_path / "run", 0, sections=RUNS[name]).replace("[serve]\nport = 0\n", ""))
    plain = build_answering_learner(read_config(path).trainer(), MemoryReplayBuffer())
    executor = ThreadPoolExecutor(1)
    recorded, state = plain.record(executor), plain.learner.state()

    def compare(rounds: int) -> None:
        for round in range(rounds):
            task = make_task(0, round, 5, 5)
            right = encode_predictions(plain.answer(state, task.support, task.query.x))
            assert encode_predictions(recorded.answer(state, task.support, task.query.x)) == right

    compare(2)
    executor.shutdown()
    compare(COMPARED_CALLS + 3)
    assert recorders
    used = [one for recorder in recorders for one in recorder._records.values() if one is not None]
    assert used, "a program answers"
    assert all(one.compared == COMPARED_CALLS for one in used)
