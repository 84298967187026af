"""A race between settings: what is dropped and what wins is logged, and restarts and replays obey it."""

import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch

from deploy.config.config import read_settings, write_settings
from deploy.forks import create_fork, play_branch
from deploy.leader import Adapter
from deploy.telemetry.run_view import Scored, open_view
from online_meta.batching.plan import ExecutionPlan
from online_meta.prediction import loss_of
from online_meta.regret.racing import drop, find_losers, observe, start_race
from online_meta.types import Batch, Task
from streams.history.history import History
from tests.support.runs import changed, fill, kill, lines, opened, play
from trainers.checkpoint import load_latest
from trainers.journal.jsonl import LineReader
from trainers.journal.plans import ExecutionPlanLog
from trainers.journal.run_files import RunFiles
from trainers.journal.tuning_log import settings_of_checkpoint
from trainers.learner_settings import Decision, lead_settings, list_learners, obey_decisions
from trainers.loop.rounds import play_rounds
from trainers.seen_inputs import SEEN
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
from trainers.settings_fingerprint import check_same_settings, fingerprint

ROUNDS = 90
FAST = "ftml.inner.lr=0.05"
SLOW = "ftml.meta.lr=0.02"
SETTINGS = TrainerSettings(
    model=ModelSettings("trainers.models:mlp", {"inputs": 1, "outputs": 1, "hidden": []}, "mse"),
    inner=InnerSettings(steps=1, lr=0.0001),
    meta=MetaSettings(lr=0.01, batch=1, gradient="first_order"),
    regret=RegretSettings(baselines=("constant",)),
    checkpoint=CheckpointSettings(every_rounds=7, keep=2),
    learner=(
        LearnerSettings("ftml", inner={"answer_steps": [4]}),
        LearnerSettings("ftml", FAST, inner={"lr": 0.05, "answer_steps": [4]}),
        LearnerSettings("ftml", SLOW, meta={"lr": 0.02}, inner={"answer_steps": [4]}),
    ),
    pool=PoolSettings("auto"),
    tuning=TuningSettings(warmup=5, alpha=0.02),
    race=("ftml", "ftml@4", FAST, f"{FAST}@4", SLOW, f"{SLOW}@4"),
)


def make_line(seed: int) -> Task:
    """Return a task of points on a line through 0 with a slope of its own."""
    random = torch.Generator().manual_seed(seed)
    x, slope = torch.randn(2, 5, 1, generator=random), 2 * torch.randn((), generator=random)
    return Task(*(Batch(part, slope * part) for part in x))


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the run that ``raced`` plays."""
    return tmp_path_factory.mktemp("race")


@pytest.fixture(scope="module")
def lines_history(run_folder: Path) -> Iterator[History]:
    """Yield a history on which more inner steps, and a larger inner learning rate, are better."""
    with History.open(RunFiles(run_folder).history, write=True) as history:
        fill(history, [make_line(t) for t in range(ROUNDS)])
        yield history


@pytest.fixture(scope="module")
def raced(run_folder: Path, lines_history: History) -> tuple[Path, dict[str, Any]]:
    """Return the folder of a run whose race has ended, and the bits of its learners."""
    return run_folder, play(run_folder, lines_history, ROUNDS, SETTINGS)


def decisions(folder: Path) -> list[dict[str, Any]]:
    found = LineReader(RunFiles(folder).tuning_log).refresh()
    return [line for line in found if line["event"] == "decision"]


def test_what_is_behind_is_dropped_and_what_wins_leads(raced: tuple[Path, dict[str, Any]]) -> None:
    folder, bits = raced
    made, records = decisions(folder), lines(folder)
    assert len(made) > 1
    assert (made[0]["winner"], made[-1]["winner"]) == (None, f"{FAST}@4")
    assert [*bits] == ["ftml", "constant", "pool"]
    race, at = start_race(SETTINGS.race), {one["round"]: one for one in made}
    for line in records[SETTINGS.tuning.warmup :]:
        losers = [one.name for one in find_losers(race, SETTINGS.tuning.alpha)] if race.rounds else []
        decision = at.get(line["round"], {"dropped": [], "winner": None})
        assert decision["dropped"] == losers, "what is dropped follows from the records of the rounds"
        race = drop(race, losers)
        if decision["winner"]:
            assert race.racing == (decision["winner"],)
            break
        assert {*race.racing} <= line["learners"].keys()
        assert not {one for one in losers if one.startswith(f"{FAST}@")} & line["learners"].keys()
        race = observe(race, {name: line["learners"][name]["loss_after"] for name in race.racing})
    after = records[made[-1]["round"]]
    assert [*after["learners"]] == ["ftml", "ftml@4", "constant", "pool"]
    assert [*load_latest(RunFiles(folder).checkpoints).learners] == ["ftml", "constant", "pool", SEEN]


def test_what_has_won_is_bit_identical_to_a_run_with_its_settings(
    raced: tuple[Path, dict[str, Any]], lines_history: History, tmp_path: Path
) -> None:
    settings = dataclasses.replace(
        changed(SETTINGS, inner={"lr": 0.05, "answer_steps": (4,)}), learner=(), race=(), pool=PoolSettings()
    )
    assert raced[1]["ftml"] == play(tmp_path, lines_history, ROUNDS, settings)["ftml"]
    won = decisions(raced[0])[-1]["round"]
    for mine, theirs in zip(lines(raced[0])[won:], lines(tmp_path)[won:], strict=True):
        assert mine["learners"]["ftml@4"] == theirs["learners"]["ftml@4"]


def test_the_pool_gives_the_weight_of_what_has_won_to_the_leader_and_none_to_what_was_dropped(
    raced: tuple[Path, dict[str, Any]],
) -> None:
    won, records = decisions(raced[0])[-1]["round"], lines(raced[0])
    before, after = (records[round]["pool"]["weights"] for round in (won - 1, won))
    assert before[f"{FAST}@4"] > 0.9
    assert after["ftml@4"] > 0.9
    assert sum(after.values()) == pytest.approx(1)
    assert all(after[name] == 0 for name in after if name.startswith("ftml.") or name not in records[won]["learners"])
    assert before["ftml@4"] == 0, "its last answer was dropped before"
    for line in records:
        assert line["pool"]["regret"] <= line["pool"]["bound"] + 1e-9


@pytest.mark.parametrize("updates", [30, 56, 58, 70])
def test_a_kill_in_a_race_changes_no_decision_and_no_bit(
    raced: tuple[Path, dict[str, Any]], lines_history: History, tmp_path: Path, updates: int
) -> None:
    kill(tmp_path, lines_history, updates, SETTINGS)
    assert play(tmp_path, lines_history, ROUNDS, SETTINGS) == raced[1]
    assert decisions(tmp_path) == decisions(raced[0])
    assert lines(tmp_path) == lines(raced[0])


def test_a_kill_before_a_decision_takes_effect_changes_nothing(
    raced: tuple[Path, dict[str, Any]], lines_history: History, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process ends when the decision is logged, and again when the run is about to go on with it."""
    for _ in range(2):
        with monkeypatch.context() as patch:
            patch.setattr("trainers.loop.rounds.adopt_decision", _die)
            with pytest.raises(RuntimeError, match="killed here"):
                play(tmp_path, lines_history, ROUNDS, SETTINGS)
    assert play(tmp_path, lines_history, ROUNDS, SETTINGS) == raced[1]
    assert decisions(tmp_path) == decisions(raced[0])


def _die(*_: object) -> None:
    raise RuntimeError("killed here")


OTHER = {"alpha": 0.9, "rounds": 6, "warmup": 0}
"""Thresholds with which the race would end otherwise."""


def test_a_replay_drops_at_the_recorded_rounds_whatever_its_own_thresholds(
    raced: tuple[Path, dict[str, Any]], lines_history: History, tmp_path: Path
) -> None:
    settings = changed(SETTINGS, tuning=OTHER)
    assert fingerprint(settings) == fingerprint(SETTINGS)
    free = tmp_path / "free"
    play(free, lines_history, 20, settings)
    assert [one["round"] for one in decisions(free)] == [6]
    own = tmp_path / "replay"
    for log in RunFiles(raced[0]).decision_logs:
        target = RunFiles(own).history / log.name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(log, target)
    assert play(own, lines_history, ROUNDS, settings) == raced[1]
    assert decisions(own) == decisions(raced[0])
    assert lines(own) == lines(raced[0])


def test_a_race_ends_after_its_rounds_and_the_smallest_loss_wins(lines_history: History, tmp_path: Path) -> None:
    settings = changed(SETTINGS, tuning={"rounds": 8, "warmup": 2})
    play(tmp_path, lines_history, 15, settings)
    (made,) = decisions(tmp_path)
    assert (made["round"], made["raced"], made["losers"]) == (10, 8, [])
    losses = {
        name: sum(line["learners"][name]["loss_after"] for line in lines(tmp_path)[2:10]) for name in settings.race
    }
    assert made["winner"] == min(losses, key=losses.__getitem__)
    assert made["mean_losses"] == pytest.approx({name: loss / 8 for name, loss in losses.items()})


def test_the_view_of_a_run_goes_on_without_what_was_dropped(raced: tuple[Path, dict[str, Any]]) -> None:
    names = ("ftml", "ftml@4", FAST, f"{FAST}@4", SLOW, f"{SLOW}@4", "constant", "pool")
    view = open_view(RunFiles(raced[0]), SETTINGS, Scored(names))
    view.refresh()
    records = lines(raced[0])
    for name in names:
        own = [line["learners"][name]["loss_after"] for line in records if name in line["learners"]]
        found = view.ledger.summarise(name)
        assert (found.rounds, found.total) == (len(own), pytest.approx(sum(own)))
    assert view.ledger.summarise(SLOW).rounds == decisions(raced[0])[-1]["round"]
    against = view.ledger.differences(SLOW)
    both = [line["learners"] for line in records if SLOW in line["learners"]]
    assert against.total == pytest.approx(sum(one["ftml"]["loss_after"] - one[SLOW]["loss_after"] for one in both))
    view.close()


@pytest.mark.parametrize("pool", [True, False])
def test_what_is_served_is_what_is_scored_after_a_race(
    pool: bool, raced: tuple[Path, dict[str, Any]], lines_history: History, tmp_path: Path
) -> None:
    folder, settings = raced[0], SETTINGS
    if not pool:
        folder, settings = tmp_path, dataclasses.replace(SETTINGS, pool=PoolSettings())
        play(tmp_path, lines_history, ROUNDS, settings)
    adapter, task = Adapter(settings, RunFiles(folder).leader), make_line(ROUNDS)
    prediction, rounds, _ = adapter.predict(task.support, task.query.x)
    with opened(folder, lines_history, settings) as run:
        scores = {name: one.scores(task) for name, one in run.learners.items() if name != "pool"}
        served = run.answering.answer(run.answering.learner.state(), task.support, task.query.x)
    loss = float(loss_of(prediction, task.query.y))
    assert rounds == ROUNDS
    assert loss == float(loss_of(served, task.query.y))
    if not pool:
        assert run.answering.suffix == "@4"
        assert loss == scores["ftml"]["@4"].loss_after


def test_the_leader_gets_the_execution_plans_of_what_has_won(
    raced: tuple[Path, dict[str, Any]], lines_history: History, tmp_path: Path
) -> None:
    """A compiled program contains the settings of its learner."""
    mine, theirs, other = (ExecutionPlan("vmap", count, "s") for count in (1, 2, 3))
    kill(tmp_path, lines_history, 60, SETTINGS)
    log = ExecutionPlanLog(RunFiles(tmp_path).execution_plan_log, fingerprint(SETTINGS), 60)
    log.record(58, {"ftml": (mine,), FAST: (theirs,), SLOW: (other,)})
    log.close()
    with opened(tmp_path, lines_history, SETTINGS) as run:
        run.plan_selector.find = lambda known, tasks: known  # type: ignore[method-assign]
        play_rounds(run, Event(), decisions(raced[0])[-1]["round"])
        assert run.journal is not None
        assert run.journal.execution_plan_log.at(run.round) == {"ftml": (theirs,), SLOW: (other,)}


@pytest.mark.parametrize(("at", "names"), [(56, ["ftml", FAST, SLOW, "constant"]), (80, ["ftml", "constant"])])
def test_a_fork_begins_with_what_the_race_has_left(
    raced: tuple[Path, dict[str, Any]], at: int, names: list[str], tmp_path: Path
) -> None:
    folder = shutil.copytree(raced[0], tmp_path / "run")
    write_settings(RunFiles(folder).settings, SETTINGS)
    fork = create_fork(folder, at, ["meta.clip_norm=1.0"])
    settings = read_settings(RunFiles(folder, fork.name).settings)
    assert [one.name for one in list_learners(settings)] == names
    left = [name for name in SETTINGS.race if name not in decisions(folder)[0]["dropped"]]
    assert settings.race == (tuple(left) if at == 56 else ())
    assert play_branch(folder, fork.name, lambda done, total: None) == ROUNDS
    mine, parent = lines(folder), LineReader(RunFiles(folder, fork.name).rounds).refresh()
    for before, line in zip(mine[:at], parent, strict=False):
        assert line["learners"] == before["learners"]
    assert next(iter(parent[-1]["learners"])) == "ftml"
    assert len(parent) == ROUNDS


def test_settings_of_a_checkpoint_are_those_before_the_decision_of_its_round(
    raced: tuple[Path, dict[str, Any]],
) -> None:
    won = decisions(raced[0])[-1]["round"]
    before, after = (settings_of_checkpoint(SETTINGS, RunFiles(raced[0]), rounds) for rounds in (won, won + 1))
    assert (lead_settings(before).inner.lr, lead_settings(after).inner.lr) == (0.0001, 0.05)
    assert settings_of_checkpoint(SETTINGS, RunFiles(raced[0]), 1) == SETTINGS
    check_same_settings(load_latest(RunFiles(raced[0]).checkpoints).settings, after)


def test_what_decisions_leave() -> None:
    first = obey_decisions(SETTINGS, [Decision(60, ("ftml", SLOW, f"{SLOW}@4"))])
    assert [one.name for one in list_learners(first)] == ["ftml", FAST, "constant"]
    alone = dataclasses.replace(SETTINGS, pool=PoolSettings())
    last = obey_decisions(alone, [Decision(60, (SLOW, "ftml", f"{SLOW}@4", "ftml@4", FAST), f"{FAST}@4")])
    (leader, constant) = list_learners(last)
    assert (leader.name, leader.inner, leader.meta) == ("ftml", {"answer_steps": [4], "lr": 0.05}, {})
    assert (constant.name, last.answers) == ("constant", "ftml@4")
    kept = dataclasses.replace(alone, answers="ftml")
    assert obey_decisions(kept, [Decision(9, (SLOW,), "ftml@4")]).answers == "ftml"
    assert obey_decisions(SETTINGS, []) is SETTINGS
