"""Which path sums the meta-gradients is found while the run goes on, and played again as it was."""

import shutil

import pytest
import torch

from online_meta.batching.plan import ExecutionPlan
from streams.history.history import History
from tests.support.runs import SETTINGS, bits, changed, fill, lines, task
from trainers.journal.plans import ExecutionPlanLog
from trainers.journal.run_files import RunFiles
from trainers.loop.rounds import close_run, open_run, play_update, start_checkpoint
from trainers.settings_fingerprint import reproducibility_key

ROUNDS = 8
SLOW, FAST = ExecutionPlan("loop", 1, "s"), ExecutionPlan("compiled", 4, "s", "abc")


@pytest.fixture
def book(tmp_path):
    return tmp_path / "history" / "paths.jsonl"


def test_a_change_holds_from_its_round_on_and_survives(book):
    paths = ExecutionPlanLog(book, "a", 0)
    assert paths.at(5) == {}
    paths.record(3, {"ftml": (SLOW,)})
    paths.record(4, {"ftml": (SLOW,)})
    paths.record(7, {"ftml": (FAST,)})
    paths.close()
    again = ExecutionPlanLog(book, "a", 0)
    assert [again.at(round) for round in (2, 3, 6, 7, 99)] == [{}, *[{"ftml": (SLOW,)}] * 2, *[{"ftml": (FAST,)}] * 2]
    assert len(book.read_text().splitlines()) == 3, "what does not change is not written"
    again.close()


def test_a_change_before_others_that_were_never_played_puts_them_aside(book):
    paths = ExecutionPlanLog(book, "", 0)
    paths.record(3, {"ftml": (SLOW,)})
    paths.record(9, {"ftml": (FAST,)})
    paths.record(5, {"ftml": (SLOW,)})  # power was lost, and rounds 5 to 9 with it
    for one in (paths, ExecutionPlanLog(book, "", 0)):
        assert one.at(9) == {"ftml": (SLOW,)}
        one.close()


def test_paths_of_another_algorithm_are_not_gone_by(book):
    mine, other = ExecutionPlanLog(book, "0.1", 0), ExecutionPlanLog(book, "0.2", 0)
    mine.record(0, {"ftml": (FAST,)})
    mine.close()
    other.close()
    other = ExecutionPlanLog(book, "0.2", 0)
    assert other.at(0) == {}
    other.close()


def test_rounds_planned_under_the_same_settings_are_bound_and_others_free(book):
    for settings, planned, bound in (("a", 0, 0), ("a", 5, 5), ("b", 5, 0), ("b", 7, 2), ("a", 7, 7)):
        paths = ExecutionPlanLog(book, settings, planned)
        assert sum(paths.is_bound(round) for round in range(20)) == bound, (settings, planned)
        paths.close()


@pytest.fixture(scope="module")
def stream(tmp_path_factory):
    history = History.open(tmp_path_factory.mktemp("stream"), write=True)
    fill(history, [task(seed) for seed in range(ROUNDS)])
    yield history
    history.close()


def go_on(run, until):
    while run.round < until:
        play_update(run, until - run.round)


def test_a_run_that_changed_its_paths_is_played_again_to_the_bit(tmp_path, stream):
    torch.set_num_threads(1)
    settings = changed(SETTINGS, checkpoint={"keep": 9})
    run = open_run(settings, RunFiles(tmp_path), stream, measure_after=1e9)
    go_on(run, 2)
    start_checkpoint(run)
    close_run(run)
    for how, until in (("vmap", 4), ("traced", 6), ("compiled", ROUNDS)):
        run = open_run(changed(settings, engine={"batching": how}), RunFiles(tmp_path), stream)
        go_on(run, until)
        assert {path.batching for paths in run.journal.execution_plan_log.at(until - 1).values() for path in paths} == {
            how
        }
        if how != "compiled":
            start_checkpoint(run)
            close_run(run)
    for round in (4, 6, 8):
        shutil.rmtree(RunFiles(tmp_path).checkpoints / str(round), ignore_errors=True)
    right, told = bits(run), lines(tmp_path)
    close_run(run)  # without a checkpoint after round 2: as if it had been killed
    run = open_run(SETTINGS, RunFiles(tmp_path), stream, measure_after=1e9)
    assert run.round == 2
    go_on(run, ROUNDS)
    assert bits(run) == right
    assert lines(tmp_path) == told
    close_run(run)


def test_the_paths_of_a_run_are_obeyed_where_others_would_be_faster(tmp_path, stream):
    run = open_run(SETTINGS, RunFiles(tmp_path), stream, measure_after=1e9)
    go_on(run, ROUNDS)
    right = bits(run)
    close_run(run)
    run = open_run(SETTINGS, RunFiles(tmp_path), stream, measure_after=0.0)
    assert run.round == 0
    go_on(run, ROUNDS)
    assert bits(run) == right
    assert run.journal.execution_plan_log.at(ROUNDS) == {}
    close_run(run)


def test_a_way_that_is_named_is_gone_from_the_first_round(tmp_path, stream):
    run = open_run(changed(SETTINGS, engine={"batching": "vmap"}), RunFiles(tmp_path), stream)
    go_on(run, 2)
    assert {path.batching for paths in run.journal.execution_plan_log.at(0).values() for path in paths} == {"vmap"}
    close_run(run)


def test_a_replay_goes_by_the_paths_of_the_run_and_another_algorithm_by_its_own(tmp_path, stream):
    """Replay has the plans and paths of the run, none of its rounds."""
    run = open_run(changed(SETTINGS, engine={"batching": "vmap"}), RunFiles(tmp_path / "run"), stream)
    go_on(run, 3)
    close_run(run)
    run = open_run(changed(SETTINGS, engine={"batching": "traced"}), RunFiles(tmp_path / "run"), stream)
    go_on(run, ROUNDS)
    right = bits(run)
    close_run(run)
    hows = {}
    for name, settings in (("same", SETTINGS), ("other", changed(SETTINGS, meta={"gradient": "first_order"}))):
        files = RunFiles(tmp_path / name)
        shutil.copytree(RunFiles(tmp_path / "run").history, files.history)
        again = open_run(changed(settings, engine={"batching": "loop"}), files, stream)
        go_on(again, ROUNDS)
        hows[name] = [
            {path.batching for path in again.journal.execution_plan_log.at(round).get("ftml", ())}
            for round in range(ROUNDS)
        ]
        assert (bits(again) == right) == (name == "same")
        close_run(again)
    assert hows["same"] == [{"vmap"}] * 3 + [{"traced"}] * (ROUNDS - 3)
    assert hows["other"] == [{"loop"}] * ROUNDS


def test_how_and_the_memory_limit_may_change_in_the_life_of_a_run():
    changes = changed(SETTINGS, engine={"batching": "traced", "memory_limit": 10**9})
    assert reproducibility_key(changes) == reproducibility_key(SETTINGS)
