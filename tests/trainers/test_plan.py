"""What timing decides is written down before it is played, and obeyed ever after."""

import os

import pytest

from trainers.plan import Plan, PlanBook, read_plans


@pytest.fixture
def path(tmp_path):
    return tmp_path / "history" / "plans.jsonl"


def test_an_update_takes_what_is_available_up_to_the_limit_and_at_least_one(path):
    book = PlanBook(path)
    assert book.decide(0, 1, 1) == Plan(0, 1)
    assert book.decide(1, 5, 3) == Plan(1, 3)
    assert book.decide(4, 2, 3) == Plan(4, 2)
    assert book.decide(6, 0, 3) == Plan(6, 1)
    book.close()
    assert read_plans(path) == [Plan(0, 1), Plan(1, 3), Plan(4, 2), Plan(6, 1)]


def test_a_plan_in_the_book_is_obeyed_whatever_is_available_now(path):
    book = PlanBook(path)
    book.decide(0, 5, 3)
    book.close()
    again = PlanBook(path)
    assert again.decide(0, 99, 50) == Plan(0, 3)
    assert again.decide(3, 99, 50) == Plan(3, 50)
    again.close()
    assert read_plans(path) == [Plan(0, 3), Plan(3, 50)]


def test_a_new_plan_is_durable_when_it_is_given_and_an_old_one_is_not_written_again(path, monkeypatch):
    synced = []
    book = PlanBook(path)
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (synced.append(len(read_plans(path))), fsync(file))[1])
    book.decide(0, 5, 3)
    assert synced == [1], "one fsync, with the plan in the file"
    book.close()
    again = PlanBook(path)
    synced.clear()
    again.decide(0, 1, 1)
    again.close()
    assert synced == []


def test_a_torn_plan_was_never_played_and_is_made_anew(path):
    book = PlanBook(path)
    book.decide(0, 5, 3)
    book.decide(3, 5, 3)
    book.close()
    path.write_bytes(path.read_bytes()[:-4])
    again = PlanBook(path)
    assert again.decide(0, 1, 1) == Plan(0, 3)
    assert again.decide(3, 1, 1) == Plan(3, 1)
    again.close()


def test_no_file_holds_no_plan(path):
    assert read_plans(path) == []
