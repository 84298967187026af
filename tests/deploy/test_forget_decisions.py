"""An entity is forgotten in a run that has decided a race or rolled back, and was forked: all of them go on."""

import shutil
import struct
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from deploy.config.config import write_settings
from deploy.erasure import adopt_epoch, apply_erasures, forget_entity
from deploy.forks import create_fork, play_branch
from online_meta.types import Batch, Task
from streams.entities import make_entity_id
from streams.formats import wire
from streams.history.history import History
from streams.history.sealing import SealingSettings, evict_payloads, seal_next
from streams.history.verify import verify
from streams.types import Record
from tests.deploy.conftest import Cli
from tests.support.runs import FALLING, lines, play, task
from tests.support.traces import find_traces
from trainers.checkpoint import list_checkpoints, load_checkpoint, load_latest
from trainers.journal.jsonl import LineReader
from trainers.journal.quarantine import QuarantineLog, make_quarantine
from trainers.journal.run_files import RunFiles
from trainers.settings import (
    CheckpointSettings,
    InnerSettings,
    LearnerSettings,
    MetaSettings,
    ModelSettings,
    PoolSettings,
    RegretSettings,
    TrainerSettings,
    TuningSettings,
)

KEY, ROUNDS, AT = "Café 7", 32, 26
OWN = (4, 12, 23, 29)
MARK = struct.pack("<2f", 0.7234567, -0.3234567)
TRACES = (b"Caf_c3_a9", b"0.72345", b"-0.32345")
FAST = "ftml.inner.lr=0.05"
RACE = TrainerSettings(
    model=ModelSettings("trainers.models:mlp", {"inputs": 2, "outputs": 3, "hidden": []}),
    inner=InnerSettings(steps=1, lr=0.0001),
    meta=MetaSettings(lr=0.01, batch=1, gradient="first_order"),
    regret=RegretSettings(baselines=("constant",)),
    checkpoint=CheckpointSettings(every_rounds=5, keep=2),
    learner=(LearnerSettings("ftml"), LearnerSettings("ftml", FAST, inner={"lr": 0.05})),
    pool=PoolSettings("auto"),
    tuning=TuningSettings(warmup=5, rounds=12),
    race=("ftml", FAST),
)
CASES = {"race": RACE, "rollback": FALLING}


class Forgotten(NamedTuple):
    """A run with a fork, its settings, the entity that is forgotten in it, and a copy from before."""

    files: RunFiles
    settings: TrainerSettings
    backup: Path


def record(t: int) -> Record:
    """Return a task; those of the entity have a row with the bytes ``MARK``."""
    mark, found = torch.frombuffer(bytearray(MARK), dtype=torch.float32), task(t)
    if t in OWN:
        found = Task(*(Batch(torch.cat([part.x[1:], mark[None]]), part.y) for part in found))
    body, key = wire.encode(found), KEY if t in OWN else f"other {t % 3}"
    return Record(make_entity_id("shops", key, str(t)), body, wire.digest(body), "shops", f"row {t}", 1.0)


def play_main(folder: Path, settings: TrainerSettings) -> Any:
    with History.open(RunFiles(folder).history, write=False) as history:
        return play(folder, history, ROUNDS, settings)


def play_fork(folder: Path) -> Any:
    """Play the fork to the end, and return the state of its learners."""
    assert play_branch(folder, "tried", lambda done, total: None) == ROUNDS
    newest = load_latest(RunFiles(folder, "tried").checkpoints)
    assert newest is not None
    return {name: {key: one.tolist() for key, one in found.items()} for name, found in newest.learners.items()}


def make_fork(folder: Path, settings: TrainerSettings) -> None:
    write_settings(RunFiles(folder).settings, settings)
    create_fork(folder, AT, ["meta.clip_norm=0.5"], "tried")


@pytest.fixture(scope="module", params=CASES)
def forgotten(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Forgotten:
    folder, settings = tmp_path_factory.mktemp("decided") / "run", CASES[request.param]
    files = RunFiles(folder)
    with History.open(files.history, write=True) as history:
        history.append([record(t) for t in range(ROUNDS)])
        while seal_next(history, SealingSettings(segment_rounds=5)):
            pass
        evict_payloads(history, 0)
    play_main(folder, settings)
    make_fork(folder, settings)
    play_fork(folder)
    log = files.tuning_log if request.param == "race" else files.rollback_log
    assert max(line.get("round", 0) for line in LineReader(log).refresh()) > OWN[0], (
        "it has decided after the first task"
    )
    assert any(MARK in path.read_bytes() for path in folder.rglob("*") if path.is_file())
    backup = shutil.copytree(folder, folder.parent / "backup")
    (done,) = forget_entity(folder, KEY)
    assert (done.rounds, {*done.learned}) == (OWN, {"main", "tried"})
    return Forgotten(files, settings, backup)


@pytest.fixture
def run(forgotten: Forgotten, tmp_path: Path) -> RunFiles:
    """A copy of the run, as the erasure has left it."""
    shutil.copytree(forgotten.files.folder, tmp_path / "run")
    shutil.copy(forgotten.files.folder.with_name("run.erasures.jsonl"), tmp_path)
    return RunFiles(tmp_path / "run")


def test_nothing_of_the_entity_is_left_and_the_race_the_rollback_and_the_fork_go_on(
    forgotten: Forgotten, run: RunFiles, tmp_path: Path
) -> None:
    settings = forgotten.settings
    assert find_traces(forgotten.backup, KEY, MARK, TRACES)
    assert find_traces(run.folder, KEY, MARK, TRACES) == []
    other = RunFiles(tmp_path / "other")
    dropped = ["plans.jsonl", "paths.jsonl", "quarantine.jsonl", "forks.jsonl", "erasures.jsonl"]
    shutil.copytree(run.history, other.history, ignore=lambda *_: dropped)
    with closing(QuarantineLog(other.quarantine_log, "")) as log:
        log.add(make_quarantine(t, 0, "operator", "x") for t in OWN)
    assert play_main(run.folder, settings) == play_main(other.folder, settings)
    for mine, theirs in zip(lines(run.folder), lines(other.folder), strict=True):
        assert mine["learners"] == theirs["learners"]
    make_fork(other.folder, settings)
    assert play_fork(run.folder) == play_fork(other.folder)
    assert find_traces(run.folder, KEY, MARK, TRACES) == []
    assert verify(run.history).clean
    with closing(History.open(run.history, write=True)) as history:
        assert apply_erasures(history, run.folder) == [], "the new checkpoints are known to be from after it"


def test_a_replay_follows_the_decisions_and_says_from_which_epoch(
    forgotten: Forgotten, run: RunFiles, tmp_path: Path
) -> None:
    learned = play_main(run.folder, forgotten.settings)
    out = RunFiles(tmp_path / "replayed")
    out.history.mkdir(parents=True)
    for log in filter(Path.exists, run.decision_logs):
        shutil.copyfile(log, out.history / log.name)
    with History.open(run.history, write=False) as history:
        assert adopt_epoch(history, out) == 1
        assert play(out.folder, history, ROUNDS, forgotten.settings) == learned
    assert [line["round"] for line in lines(out.folder) if line["skipped"]] == list(OWN)


@pytest.mark.parametrize("branch", ["main", "tried"])
def test_checkpoints_that_alone_are_restored_are_recognised(
    forgotten: Forgotten, run: RunFiles, branch: str, cli: Cli
) -> None:
    learned, forked = play_main(run.folder, forgotten.settings), play_fork(run.folder)
    files, before = RunFiles(run.folder, branch), RunFiles(forgotten.backup, branch)
    shutil.rmtree(files.checkpoints)
    shutil.copytree(before.checkpoints, files.checkpoints)
    assert max(list_checkpoints(files.checkpoints)) > OWN[0]
    ended = cli("forget", run.folder)
    assert ended.code == 0, ended.err
    assert (
        f"checkpoints from before an erasure, as a backup has them, had learned: the next start of {branch}"
        in ended.out
    )
    assert all(rounds <= OWN[0] for rounds in list_checkpoints(files.checkpoints))
    assert "no erasure is left to complete" in cli("forget", run.folder).out
    assert (play_main(run.folder, forgotten.settings), play_fork(run.folder)) == (learned, forked)
    newest = max(list_checkpoints(files.checkpoints))
    assert load_checkpoint(files.checkpoints / str(newest)).erasures == 1
