"""Decisions that depend on timing are logged before they are played, and followed from then on."""

import os

import pytest

from trainers.journal.plans import UpdateLog, UpdatePlan, read_plans


@pytest.fixture
def path(tmp_path):
    return tmp_path / "history" / "plans.jsonl"


def test_an_update_takes_the_available_rounds_up_to_the_limit_and_at_least_one(path):
    update_log = UpdateLog(path)
    assert update_log.choose_rounds(0, 1, 1) == UpdatePlan(0, 1)
    assert update_log.choose_rounds(1, 5, 3) == UpdatePlan(1, 3)
    assert update_log.choose_rounds(4, 2, 3) == UpdatePlan(4, 2)
    assert update_log.choose_rounds(6, 0, 3) == UpdatePlan(6, 1)
    update_log.close()
    assert read_plans(path) == [UpdatePlan(0, 1), UpdatePlan(1, 3), UpdatePlan(4, 2), UpdatePlan(6, 1)]


def test_a_logged_plan_is_followed_whatever_is_available_now(path):
    update_log = UpdateLog(path)
    update_log.choose_rounds(0, 5, 3)
    update_log.close()
    again = UpdateLog(path)
    assert again.choose_rounds(0, 99, 50) == UpdatePlan(0, 3)
    assert again.choose_rounds(3, 99, 50) == UpdatePlan(3, 50)
    again.close()
    assert read_plans(path) == [UpdatePlan(0, 3), UpdatePlan(3, 50)]


def test_a_new_plan_is_in_the_file_at_once_and_durable_after_one_sync(path, monkeypatch):
    synced = []
    update_log = UpdateLog(path)
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (synced.append(len(read_plans(path))), fsync(file))[1])
    update_log.choose_rounds(0, 5, 3)
    assert (read_plans(path), synced) == ([UpdatePlan(0, 3)], [])
    update_log.choose_rounds(3, 2, 3)
    update_log.sync()
    update_log.sync()
    assert synced == [2], "one fsync, with both plans in the file"
    update_log.close()


def test_an_old_plan_is_not_rewritten(path):
    update_log = UpdateLog(path)
    update_log.choose_rounds(0, 5, 3)
    update_log.close()
    again = UpdateLog(path)
    again.choose_rounds(0, 1, 1)
    assert again.last == UpdatePlan(0, 3)
    again.close()
    assert read_plans(path) == [UpdatePlan(0, 3)]


def test_a_torn_plan_is_planned_again_because_it_was_never_played(path):
    update_log = UpdateLog(path)
    update_log.choose_rounds(0, 5, 3)
    update_log.choose_rounds(3, 5, 3)
    update_log.close()
    path.write_bytes(path.read_bytes()[:-4])
    again = UpdateLog(path)
    assert again.choose_rounds(0, 1, 1) == UpdatePlan(0, 3)
    assert again.choose_rounds(3, 1, 1) == UpdatePlan(3, 1)
    again.close()


def test_a_missing_file_holds_no_plan(path):
    assert read_plans(path) == []
