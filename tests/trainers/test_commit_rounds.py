"""While rounds wait to be played, few syncs make many plans durable, and no line leaves before its plan is."""

import os

import pytest

from tests.support.runs import SETTINGS, changed, lines, opened, play
from tests.trainers.conftest import ROUNDS
from trainers.journal.jsonl import LineWriter
from trainers.journal.plans import read_plans
from trainers.journal.run_files import RunFiles
from trainers.loop.rounds import play_update


@pytest.fixture
def synced(monkeypatch):
    """The paths of all files that are synced, in order."""
    found, fsync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (found.append(os.readlink(f"/proc/self/fd/{file}")), fsync(file))[1])
    return found


def test_no_line_is_written_before_the_plan_of_its_round_is_durable(tmp_path, history, monkeypatch):
    files, durable, checked = RunFiles(tmp_path), [0], []
    sync, append = LineWriter.sync, LineWriter.append

    def sync_and_note(writer):
        sync(writer)
        if writer._file.name == str(files.update_log):
            durable[0] = len(read_plans(files.update_log))

    def append_and_check(writer, line):
        if writer._file.name == str(files.rounds):
            assert line["round"] < durable[0], "its plan may be lost"
            checked.append(line["round"])
        append(writer, line)

    monkeypatch.setattr(LineWriter, "sync", sync_and_note)
    monkeypatch.setattr(LineWriter, "append", append_and_check)
    play(tmp_path, history, ROUNDS)
    assert checked == [*range(ROUNDS)]


def test_one_sync_makes_the_plans_of_all_rounds_durable_that_wait(tmp_path, history, unhurried, synced):
    play(tmp_path, history, ROUNDS, changed(SETTINGS, checkpoint={"every_rounds": 100}))
    own = [path for path in synced if path == str(RunFiles(tmp_path).update_log)]
    assert len(own) == 1
    assert len(lines(tmp_path)) == ROUNDS


def test_a_round_that_nothing_follows_is_committed_at_once(tmp_path, history, unhurried):
    with opened(tmp_path, history, SETTINGS) as run:
        play_update(run, 3, may_wait=True)
        play_update(run, 2, may_wait=True)
        assert lines(tmp_path) == []
        play_update(run, 1, may_wait=True)
        assert [line["round"] for line in lines(tmp_path)] == [0, 1, 2]
