"""Past tasks in memory."""

import pytest

from online_meta.learners import MemoryReplayBuffer
from online_meta.testing.learner_problems import stream


def test_it_gives_back_what_it_was_given():
    past, tasks = MemoryReplayBuffer(), stream(3)
    for round, task in enumerate(tasks):
        past.add(round, task)
    assert [past[round] for round in range(3)] == tasks
    with pytest.raises(IndexError):
        past[3]


def test_a_round_that_is_played_again_with_another_task_holds_the_new_one():
    past, (first, second, other) = MemoryReplayBuffer(), stream(3)
    past.add(0, first)
    past.add(1, second)
    past.add(0, other)
    assert past[0] is other
    assert past[1] is second


@pytest.mark.parametrize("round", [2, -1])
def test_a_gap_is_refused(round):
    past, (first, second) = MemoryReplayBuffer(), stream(2)
    past.add(0, first)
    with pytest.raises(IndexError, match=f"round {round} comes after round 1, which is missing"):
        past.add(round, second)
