"""A run selects its execution plans while it runs, and a replay uses the same ones."""

import json
import shutil

import pytest
import torch

from online_meta.batches import select_samples
from online_meta.batching.plan import ExecutionPlan
from online_meta.types import Task
from streams.history.history import History
from tests.support.runs import SETTINGS, bits, changed, fill, lines, task
from trainers.journal.plans import ExecutionPlanLog, execution_plans_from_json, execution_plans_to_json
from trainers.journal.run_files import RunFiles
from trainers.loop.rounds import open_run, play_update, start_checkpoint
from trainers.loop.run import close_run
from trainers.settings_fingerprint import reproducibility_key

ROUNDS = 8
SLOW, FAST = ExecutionPlan("loop", 1, "s"), ExecutionPlan("compiled", 4, "s", "abc")


@pytest.fixture
def log_file(tmp_path):
    return tmp_path / "history" / "paths.jsonl"


def test_a_plan_holds_from_its_round_on_and_survives_a_restart(log_file):
    plan_log = ExecutionPlanLog(log_file, "a", 0)
    assert plan_log.at(5) == {}
    plan_log.record(3, {"ftml": (SLOW,)})
    plan_log.record(4, {"ftml": (SLOW,)})
    plan_log.record(7, {"ftml": (FAST,)})
    plan_log.close()
    again = ExecutionPlanLog(log_file, "a", 0)
    assert [again.at(round) for round in (2, 3, 6, 7, 99)] == [{}, *[{"ftml": (SLOW,)}] * 2, *[{"ftml": (FAST,)}] * 2]
    assert len(log_file.read_text().splitlines()) == 3, "an unchanged plan is not written"
    again.close()


def test_a_plan_replaces_later_ones_that_were_never_played(log_file):
    plan_log = ExecutionPlanLog(log_file, "", 0)
    plan_log.record(3, {"ftml": (SLOW,)})
    plan_log.record(9, {"ftml": (FAST,)})
    plan_log.record(5, {"ftml": (SLOW,)})  # a power loss took rounds 5 to 9
    for one in (plan_log, ExecutionPlanLog(log_file, "", 0)):
        assert one.at(9) == {"ftml": (SLOW,)}
        one.close()


def test_plans_of_another_algorithm_are_ignored(log_file):
    mine, other = ExecutionPlanLog(log_file, "0.1", 0), ExecutionPlanLog(log_file, "0.2", 0)
    mine.record(0, {"ftml": (FAST,)})
    mine.close()
    other.close()
    other = ExecutionPlanLog(log_file, "0.2", 0)
    assert other.at(0) == {}
    other.close()


def test_only_rounds_planned_under_the_same_settings_are_bound_to_their_plan(log_file):
    for settings, planned, bound in (("a", 0, 0), ("a", 5, 5), ("b", 5, 0), ("b", 7, 2), ("a", 7, 7)):
        plan_log = ExecutionPlanLog(log_file, settings, planned)
        assert sum(plan_log.is_bound(round) for round in range(20)) == bound, (settings, planned)
        plan_log.close()


@pytest.fixture(scope="module")
def stream(tmp_path_factory):
    history = History.open(tmp_path_factory.mktemp("stream"), write=True)
    fill(history, [task(seed) for seed in range(ROUNDS)])
    yield history
    history.close()


def play_until(run, until):
    while run.round < until:
        play_update(run, until - run.round)


def test_a_run_that_changed_its_plans_replays_bit_for_bit(tmp_path, stream):
    torch.set_num_threads(1)
    settings = changed(SETTINGS, checkpoint={"keep": 9})
    run = open_run(settings, RunFiles(tmp_path), stream, measure_after=1e9)
    play_until(run, 2)
    start_checkpoint(run)
    close_run(run)
    for how, until in (("vmap", 4), ("traced", 6), ("compiled", ROUNDS)):
        run = open_run(changed(settings, engine={"batching": how}), RunFiles(tmp_path), stream)
        play_until(run, until)
        assert {plan.batching for plans in run.journal.execution_plan_log.at(until - 1).values() for plan in plans} == {
            how
        }
        if how != "compiled":
            start_checkpoint(run)
            close_run(run)
    for round in (4, 6, 8):
        shutil.rmtree(RunFiles(tmp_path).checkpoints / str(round), ignore_errors=True)
    right, rounds_written = bits(run), lines(tmp_path)
    close_run(run)  # no checkpoint after round 2, as after a kill
    run = open_run(SETTINGS, RunFiles(tmp_path), stream, measure_after=1e9)
    assert run.round == 2
    play_until(run, ROUNDS)
    assert bits(run) == right
    assert lines(tmp_path) == rounds_written
    close_run(run)


def test_a_replay_keeps_the_plans_of_its_run_even_if_others_are_faster(tmp_path, stream):
    run = open_run(SETTINGS, RunFiles(tmp_path), stream, measure_after=1e9)
    play_until(run, ROUNDS)
    right = bits(run)
    close_run(run)
    run = open_run(SETTINGS, RunFiles(tmp_path), stream, measure_after=0.0)
    assert run.round == 0
    play_until(run, ROUNDS)
    assert bits(run) == right
    assert run.journal.execution_plan_log.at(ROUNDS) == {}
    close_run(run)


def test_a_configured_batching_is_used_from_the_first_round(tmp_path, stream):
    run = open_run(changed(SETTINGS, engine={"batching": "vmap"}), RunFiles(tmp_path), stream)
    play_until(run, 2)
    assert {plan.batching for plans in run.journal.execution_plan_log.at(0).values() for plan in plans} == {"vmap"}
    close_run(run)


def test_a_replay_uses_its_runs_plans_and_another_algorithm_its_own(tmp_path, stream):
    """The replay has the run's update log and plan log, but none of its rounds."""
    run = open_run(changed(SETTINGS, engine={"batching": "vmap"}), RunFiles(tmp_path / "run"), stream)
    play_until(run, 3)
    close_run(run)
    run = open_run(changed(SETTINGS, engine={"batching": "traced"}), RunFiles(tmp_path / "run"), stream)
    play_until(run, ROUNDS)
    right = bits(run)
    close_run(run)
    batchings = {}
    for name, settings in (("same", SETTINGS), ("other", changed(SETTINGS, meta={"gradient": "first_order"}))):
        files = RunFiles(tmp_path / name)
        shutil.copytree(RunFiles(tmp_path / "run").history, files.history)
        again = open_run(changed(settings, engine={"batching": "loop"}), files, stream)
        play_until(again, ROUNDS)
        batchings[name] = [
            {plan.batching for plan in again.journal.execution_plan_log.at(round).get("ftml", ())}
            for round in range(ROUNDS)
        ]
        assert (bits(again) == right) == (name == "same")
        close_run(again)
    assert batchings["same"] == [{"vmap"}] * 3 + [{"traced"}] * (ROUNDS - 3)
    assert batchings["other"] == [{"loop"}] * ROUNDS


def test_batching_and_the_memory_limit_may_change_during_a_run():
    changes = changed(SETTINGS, engine={"batching": "traced", "memory_limit": 10**9, "pad_sizes": (8, 16)})
    assert reproducibility_key(changes) == reproducibility_key(SETTINGS)


@pytest.fixture(scope="module")
def uneven(tmp_path_factory):
    """Return a history whose tasks have sets of many sizes."""
    history = History.open(tmp_path_factory.mktemp("uneven"), write=True)
    whole = [task(seed) for seed in range(ROUNDS)]
    sizes = [(1 + seed % 6, 1 + (3 * seed) % 4) for seed in range(ROUNDS)]
    cut = [
        Task(*(select_samples(batch, slice(0, size)) for batch, size in zip(one, pair, strict=True)))
        for one, pair in zip(whole, sizes, strict=True)
    ]
    fill(history, cut)
    yield history
    history.close()


def test_padded_plans_are_recorded_and_a_replay_pads_alike_whatever_its_settings_say(tmp_path, uneven):
    settings = changed(SETTINGS, engine={"batching": "traced"}, regret={"baselines": ()})
    run = open_run(settings, RunFiles(tmp_path / "run"), uneven)
    play_until(run, 5)
    start_checkpoint(run)
    close_run(run)
    run = open_run(settings, RunFiles(tmp_path / "run"), uneven)
    play_until(run, ROUNDS)
    right, recorded = bits(run), run.journal.execution_plan_log.at(ROUNDS)
    close_run(run)
    pads = [plan.pad for plan in recorded["ftml"]]
    assert pads.count(()) == 2
    assert 0 < len(pads) - 2 <= 4
    assert execution_plans_from_json(json.loads(json.dumps(execution_plans_to_json(recorded)))) == recorded
    for name, pad_sizes in (("same", None), ("none", ()), ("others", (3, 9))):
        files = RunFiles(tmp_path / name)
        shutil.copytree(RunFiles(tmp_path / "run").history, files.history)
        again = open_run(changed(settings, engine={"pad_sizes": pad_sizes}), files, uneven)
        play_until(again, ROUNDS)
        assert bits(again) == right
        close_run(again)


def test_plans_of_earlier_versions_are_read_as_they_were_written():
    written = {"ftml": [["traced", 4, "support x float32[6, 2] y int64[6], query ...", "abc"]]}
    assert execution_plans_to_json(execution_plans_from_json(written)) == written
