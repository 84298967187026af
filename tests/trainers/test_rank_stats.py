"""How a rank's time is measured, and the file that reports it."""

import json
import os
from threading import Event
from types import SimpleNamespace

import pytest

from streams.history.history import History
from tests.support.runs import SETTINGS, fill, opened, play, task
from trainers.distributed import rank_stats as rank_stats_module
from trainers.distributed.rank_stats import RankStats, measure_collectives
from trainers.distributed.ranks import SINGLE_PROCESS, RankGroup
from trainers.journal.run_files import RunFiles
from trainers.loop.rounds import POLL_SECONDS, open_run, play_rounds
from trainers.loop.run import close_run


class Clock:
    """A stand-in for the clock of rank statistics: it advances only when a test says so."""

    def __init__(self):
        self.now = 1000.0

    def pass_seconds(self, seconds):
        self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    found = Clock()
    monkeypatch.setattr(rank_stats_module, "time", SimpleNamespace(monotonic=lambda: found.now))
    return found


def test_work_time_excludes_waiting_time(clock):
    rank_stats = RankStats()
    with rank_stats.measure_work():
        clock.pass_seconds(0.5)
        with rank_stats.measure_waiting():
            clock.pass_seconds(2)
        clock.pass_seconds(0.25)
    with rank_stats.measure_waiting():
        clock.pass_seconds(1)
    assert (rank_stats.step_seconds, rank_stats.waiting_seconds) == (0.75, 3)


def test_the_time_of_a_failed_collective_counts_as_waiting(clock):
    rank_stats = RankStats()

    @rank_stats.measure_waiting()
    def broken():
        clock.pass_seconds(5)
        raise RuntimeError

    with pytest.raises(RuntimeError):
        broken()
    assert rank_stats.waiting_seconds == 5


@pytest.mark.parametrize("name", ["broadcast", "broadcast_tensors", "send", "gather"])
def test_every_collective_of_a_rank_group_is_measured(clock, name):
    def slow(value):
        clock.pass_seconds(2)
        return value

    rank_stats = RankStats()
    rank_group = measure_collectives(RankGroup(0, 2, (0, 1), slow, slow, slow, gather=slow), rank_stats)
    assert getattr(rank_group, name)("something") == "something"
    assert rank_stats.waiting_seconds == 2
    assert (rank_group.rank, rank_group.world, rank_group.with_storage) == (0, 2, (0, 1))


def test_a_single_process_has_no_collectives_to_measure():
    assert measure_collectives(SINGLE_PROCESS, RankStats()) is SINGLE_PROCESS
    assert SINGLE_PROCESS.gather({"rank": 0}) == [{"rank": 0}]


def test_a_single_process_reports_itself_as_the_only_rank(tmp_path):
    with History.open(tmp_path / "history", write=True) as history:
        fill(history, [task(seed) for seed in range(3)])
        with opened(tmp_path, history) as run:
            run.journal.started = 1_800_000_000.5
            assert play_rounds(run, Event(), 3) == 3
    report = json.loads((tmp_path / "ranks.json").read_text())
    assert (report["world_size"], report["near"]) == (1, [0])
    assert report["started"] == 1_800_000_000.5
    (rank,) = report["ranks"]
    assert (rank["rank"], rank["pid"], rank["waiting_seconds"]) == (0, os.getpid(), 0)


def test_a_rank_report_that_cannot_be_written_stops_nothing(tmp_path):
    (tmp_path / "ranks.json").mkdir()
    with History.open(tmp_path / "history", write=True) as history:
        fill(history, [task(0)])
        play(tmp_path, history, 1)
    assert (tmp_path / "ranks.json").is_dir()


class StopsAfter(Event):
    """A stop event that is set after ``waits`` waits for tasks; it never really waits."""

    def __init__(self, waits):
        super().__init__()
        self.left = waits

    def wait(self, timeout=None):
        assert timeout == POLL_SECONDS
        self.left -= 1
        if not self.left:
            self.set()
        return self.is_set()


@pytest.mark.parametrize(("pause", "counted"), [(POLL_SECONDS / 2, 0.0), (POLL_SECONDS + 0.1, 0.1)])
def test_waiting_for_a_task_does_not_count_as_waiting_for_ranks(tmp_path, clock, pause, counted):
    """Ranks poll for tasks independently: only the time above the polling interval is due to a slow rank."""

    commands = []

    def broadcast(value):
        commands.append(value[0] if isinstance(value, list) else None)
        clock.pass_seconds(pause)
        return value

    rank_group = RankGroup(0, 2, (0,), broadcast, gather=lambda value: [value])
    with History.open(tmp_path / "history", write=True) as history:
        run = open_run(SETTINGS, RunFiles(tmp_path), history, rank_group=rank_group)
        assert run.rank_stats.waiting_seconds == 0
        commands.clear()
        assert play_rounds(run, StopsAfter(10)) == 0
        close_run(run)
    assert commands.count("wait") == 10
    others = len(commands) - 10
    assert run.rank_stats.waiting_seconds == pytest.approx(10 * counted + others * pause)
