"""The replay buffer in memory."""

import pytest

from online_meta.learners import MemoryReplayBuffer
from online_meta.testing.learner_problems import stream


def test_the_buffer_returns_the_tasks_that_were_added():
    buffer, tasks = MemoryReplayBuffer(), stream(3)
    for round, task in enumerate(tasks):
        buffer.add(round, task)
    assert [buffer[round] for round in range(3)] == tasks
    with pytest.raises(IndexError):
        buffer[3]


def test_adding_a_round_again_replaces_its_task():
    buffer, (first, second, other) = MemoryReplayBuffer(), stream(3)
    buffer.add(0, first)
    buffer.add(1, second)
    buffer.add(0, other)
    assert buffer[0] is other
    assert buffer[1] is second


@pytest.mark.parametrize("round", [2, -1])
def test_a_gap_between_rounds_is_refused(round):
    buffer, (first, second) = MemoryReplayBuffer(), stream(2)
    buffer.add(0, first)
    with pytest.raises(IndexError, match=f"round {round} comes after round 1, which is missing"):
        buffer.add(round, second)
