"""How a rank's time goes, and the file that tells it."""

import json
import os
import time
from threading import Event, Timer

import pytest

from streams.history.history import History
from tests.trainers.runs import SETTINGS, fill, play, task
from trainers.distributed.rank_stats import RankStats, measure_collectives
from trainers.distributed.ranks import SINGLE_PROCESS, RankGroup
from trainers.journal.run_files import RunFiles
from trainers.loop.rounds import close_run, open_run, play_rounds


def test_work_is_what_is_not_waiting():
    rank_stats = RankStats()
    with rank_stats.measure_work():
        time.sleep(0.05)
        with rank_stats.measure_waiting():
            time.sleep(0.2)
    with rank_stats.measure_waiting():
        time.sleep(0.1)
    assert rank_stats.step_seconds == pytest.approx(0.05, abs=0.04)
    assert rank_stats.waiting_seconds == pytest.approx(0.3, abs=0.06)


def test_a_collective_that_fails_was_waited_for_too():
    rank_stats = RankStats()

    @rank_stats.measure_waiting()
    def broken():
        time.sleep(0.05)
        raise RuntimeError

    with pytest.raises(RuntimeError):
        broken()
    assert rank_stats.waiting_seconds >= 0.05


@pytest.mark.parametrize("name", ["broadcast", "broadcast_tensors", "send", "gather"])
def test_every_collective_of_a_crew_is_counted(name):
    def slow(value):
        time.sleep(0.02)
        return value

    rank_stats = RankStats()
    rank_group = measure_collectives(RankGroup(0, 2, (0, 1), slow, slow, slow, gather=slow), rank_stats)
    assert getattr(rank_group, name)("something") == "something"
    assert rank_stats.waiting_seconds >= 0.02
    assert (rank_group.rank, rank_group.world, rank_group.with_storage) == (0, 2, (0, 1))


def test_who_is_alone_waits_for_nobody():
    assert measure_collectives(SINGLE_PROCESS, RankStats()) is SINGLE_PROCESS
    assert SINGLE_PROCESS.gather({"rank": 0}) == [{"rank": 0}]


def test_one_process_is_a_roll_of_one(tmp_path):
    began = time.time()
    with History.open(tmp_path / "history", write=True) as history:
        fill(history, [task(seed) for seed in range(3)])
        play(tmp_path, history, 3)
    report = json.loads((tmp_path / "ranks.json").read_text())
    assert (report["world_size"], report["near"]) == (1, [0])
    assert began <= report["started"] <= time.time()
    (rank,) = report["ranks"]
    assert (rank["rank"], rank["pid"], rank["waiting_seconds"]) == (0, os.getpid(), 0)


def test_a_roll_that_cannot_be_written_stops_nothing(tmp_path):
    (tmp_path / "ranks.json").mkdir()
    with History.open(tmp_path / "history", write=True) as history:
        fill(history, [task(0)])
        play(tmp_path, history, 1)
    assert (tmp_path / "ranks.json").is_dir()


@pytest.mark.parametrize(("pause", "least", "most"), [(0.01, 0.0, 0.06), (0.12, 0.25, 0.6)])
def test_an_idle_rank_waits_for_a_task_and_not_for_the_others(tmp_path, pause, least, most):
    """Ranks look for tasks at their own pace: only what is longer than that is a rank that is slow."""

    def broadcast(value):
        time.sleep(pause)
        return value

    stop = Event()
    rank_group = RankGroup(0, 2, (0,), broadcast, gather=lambda value: [value])
    with History.open(tmp_path / "history", write=True) as history:
        run = open_run(SETTINGS, RunFiles(tmp_path), history, rank_group=rank_group)
        Timer(0.5, stop.set).start()
        assert play_rounds(run, stop) == 0
        close_run(run)
    assert least <= run.rank_stats.waiting_seconds <= most
