"""Past tasks in memory."""

import pytest

from online_meta.past import MemoryPast
from tests.learners.problems import stream


def test_it_gives_back_what_it_was_given():
    past, tasks = MemoryPast(), stream(3)
    for round, task in enumerate(tasks):
        past.remember(round, task)
    assert [past[round] for round in range(3)] == tasks
    with pytest.raises(IndexError):
        past[3]


def test_a_round_that_is_played_again_with_another_task_holds_the_new_one():
    past, (first, second, other) = MemoryPast(), stream(3)
    past.remember(0, first)
    past.remember(1, second)
    past.remember(0, other)
    assert past[0] is other
    assert past[1] is second


@pytest.mark.parametrize("round", [2, -1])
def test_a_gap_is_refused(round):
    past, (first, second) = MemoryPast(), stream(2)
    past.remember(0, first)
    with pytest.raises(IndexError, match=f"round {round} comes after round 1, which is missing"):
        past.remember(round, second)
