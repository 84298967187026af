"""Prefetching returns the same tasks sooner, is bounded, and raises errors where a task is requested."""

import errno
import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from online_meta.replay import _task_stacks
from online_meta.types import Task
from streams.formats import wire
from streams.history.errors import HistoryDamaged
from streams.history.history import History
from streams.sources.sinusoid import make_task
from streams.types import Record
from tests.support.daemon import wait_for
from trainers.loop import task_prefetch
from trainers.loop.task_prefetch import HistoryBuffer, TaskPrefetcher, extend_in_file

ROUNDS = 40


class ObservedHistory(History):
    """A history that records which rounds were read together, and that can be made to wait or to fail."""

    reads: list[list[int]]
    gate: threading.Event | None = None
    fault: Exception | None = None

    def tasks(self, rounds: Sequence[int]) -> list[Task]:
        self._observe(rounds)
        return super().tasks(rounds)

    def stacks(self, rounds: Sequence[int]) -> list[tuple[list[int], Task]]:
        self._observe(rounds)
        return super().stacks(rounds)

    def _observe(self, rounds: Sequence[int]) -> None:
        self.reads = [*getattr(self, "reads", []), list(rounds)]
        if self.gate is not None:
            assert self.gate.wait(60)
        if self.fault is not None:
            raise self.fault

    @property
    def read(self) -> list[int]:
        return [round for rounds in getattr(self, "reads", []) for round in rounds]


@pytest.fixture
def history(tmp_path: Path) -> Iterator[ObservedHistory]:
    with ObservedHistory.open(tmp_path / "history", write=True) as opened:
        bodies = [wire.encode(make_task(0, t, 5, 5)) for t in range(ROUNDS)]
        opened.append([Record(f"t{t}", body, wire.digest(body), "s", None, 1.0) for t, body in enumerate(bodies)])
        yield opened


@pytest.fixture
def buffer(history: ObservedHistory) -> Iterator[HistoryBuffer]:
    opened = HistoryBuffer(history, torch.device("cpu"))
    yield opened
    if history.gate is not None:
        history.gate.set()
    opened.close()


def same(one: Task, other: Task) -> bool:
    pairs = zip((*one.support, *one.query), (*other.support, *other.query), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def test_expected_rounds_are_read_before_they_are_requested(history: ObservedHistory, buffer: HistoryBuffer) -> None:
    wanted = [7, 3, 3, 30]
    buffer.prefetch("me", wanted)
    wait_for("the expected rounds are read", lambda: sorted(history.read) == [3, 7, 30])
    buffer.prefetch("me", [*wanted, 5])
    wait_for("the new round is read", lambda: history.read[3:] == [5])
    given = [buffer[round] for round in (*wanted, 5)]
    assert len(history.read) == 4, "nothing was read twice or on request"
    assert all(same(task, history[round]) for task, round in zip(given, (*wanted, 5), strict=True))
    assert same(buffer[7], history[7]), "a round that was returned is read again"


def test_each_consumer_has_its_own_expected_rounds(history: ObservedHistory, buffer: HistoryBuffer) -> None:
    buffer.prefetch("me", [1, 2])
    buffer.prefetch("you", [2, 3])
    wait_for("all are read", lambda: sorted(set(history.read)) == [1, 2, 3])
    before = len(history.read)
    buffer.prefetch("me", [4])
    wait_for("the new one is read", lambda: 4 in history.read)
    assert same(buffer[3], history[3])
    assert same(buffer[2], history[2])
    assert len(history.read) == before + 1, "the other consumer's rounds were kept"


def test_a_request_for_a_round_being_read_waits_for_it(history: ObservedHistory, buffer: HistoryBuffer) -> None:
    history.gate = threading.Event()
    buffer.prefetch("me", [1])
    wait_for("the round is being read", lambda: history.read == [1])
    given: list[Task] = []
    asking = threading.Thread(target=lambda: given.append(buffer[1]))
    asking.start()
    history.gate.set()
    asking.join(60)
    assert same(given[0], history[1])
    assert history.read == [1]


@pytest.mark.parametrize("most", ["tasks", "bytes"])
def test_the_number_and_size_of_prefetched_tasks_are_bounded(
    most: str, history: ObservedHistory, buffer: HistoryBuffer, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = sum(tensor.nbytes for batch in history[0] for tensor in batch)
    monkeypatch.setattr(task_prefetch, "MAX_TASKS", 9 if most == "tasks" else ROUNDS)
    monkeypatch.setattr(task_prefetch, "MAX_BYTES", 9 * size if most == "bytes" else 1_000_000)
    buffer.prefetch("me", range(ROUNDS))
    at_most = 9 if most == "tasks" else 16  # a batch that is being read when the limit is reached still completes
    wait_for("prefetching stops", lambda: len(history.read) == at_most)
    given = [buffer[round] for round in range(ROUNDS)]
    assert all(same(task, history[round]) for round, task in enumerate(given))


@pytest.mark.parametrize("round", [12, ROUNDS])
def test_an_unreadable_round_fails_where_it_is_requested(
    history: ObservedHistory, buffer: HistoryBuffer, round: int
) -> None:
    with history.borrow_writer() as writer:
        writer.execute("UPDATE payloads SET payload = zeroblob(50) WHERE round = 12")
    buffer.prefetch("me", [11, round, 13])
    wait_for("every round was tried", lambda: set(history.read) == {11, round, 13})
    assert same(buffer[11], history[11])
    with pytest.raises((HistoryDamaged, IndexError), match=f"round {round}"):
        buffer[round]
    assert same(buffer[13], history[13])
    buffer.prefetch("me", [14])
    wait_for("prefetching continues", lambda: 14 in history.read)


def test_the_prefetch_thread_ends_with_close(history: ObservedHistory) -> None:
    def threads() -> list[str]:
        return [thread.name for thread in threading.enumerate() if thread.name == "read-ahead"]

    reading = TaskPrefetcher(history)
    assert threads() == [], "the thread starts with the first prefetch"
    reading.prefetch("me", [1])
    assert threads() == ["read-ahead"]
    reading.close()
    assert threads() == []
    reading.prefetch("me", [2])
    assert threads() == []
    assert reading.take(2) is None


def test_new_rounds_are_read_a_few_at_once_and_never_twice(history: ObservedHistory, buffer: HistoryBuffer) -> None:
    for round in range(ROUNDS):
        buffer.read_ahead(range(round, ROUNDS))
        assert same(buffer[round], History.tasks(history, [round])[0])
    assert history.read == [*range(ROUNDS)]
    assert len(history.reads) <= 7, "the first one alone, then eight at a time"
    buffer.read_ahead(range(3, ROUNDS))
    assert same(buffer[3], History.tasks(history, [3])[0]), "after a rollback"


def test_fewer_large_tasks_are_read_at_once(
    history: ObservedHistory, buffer: HistoryBuffer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(task_prefetch, "MAX_BYTES", 3 * sum(part.nbytes for batch in history[0] for part in batch))
    for round in range(7):
        buffer.read_ahead(range(round, ROUNDS))
        buffer[round]
    assert history.reads == [[0], [1, 2, 3], [4, 5, 6]]


def test_a_round_that_cannot_be_read_ahead_fails_where_it_is_requested(
    history: ObservedHistory, buffer: HistoryBuffer
) -> None:
    history.fault = HistoryDamaged("round 0 is damaged")
    buffer.read_ahead(range(ROUNDS))
    with pytest.raises(HistoryDamaged, match="round 0"):
        buffer[0]


def test_rounds_of_an_earlier_process_are_stacked_a_few_at_a_time(
    history: ObservedHistory, buffer: HistoryBuffer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(task_prefetch, "TASKS_PER_FILL", 10)
    buffer.exclude([3])
    buffer.available(ROUNDS)
    for _ in range(6):
        buffer.gather([0])
    assert set(history.read) == {*range(ROUNDS)} - {3}
    before = len(history.reads)
    for round in {*range(ROUNDS)} - {3}:
        assert same(buffer.gather([round])[0], History.tasks(history, [round])[0])
    assert not [rounds for rounds in history.reads[before:] if rounds], "all are stacked"


def test_a_round_that_cannot_be_stacked_is_read_where_it_is_needed(
    history: ObservedHistory, buffer: HistoryBuffer
) -> None:
    buffer.available(ROUNDS)
    history.fault = HistoryDamaged("round 7 is damaged")
    with pytest.raises(HistoryDamaged, match="round 7"):
        buffer.gather([7])
    history.fault = None
    assert same(buffer.gather([7])[0], history[7])


def test_stacked_tasks_beyond_the_limit_of_memory_are_in_files_that_end_with_the_process(
    history: ObservedHistory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_task_stacks, "FIRST_ROWS", 4)
    monkeypatch.setattr(task_prefetch, "STACK_BYTES", 8 * sum(t.nbytes for batch in history[0] for t in batch))
    files: list[int] = []

    def count_and_extend(rows: Tensor, folder: Path) -> Tensor:
        files.append(len(rows))
        return extend_in_file(rows, folder)

    monkeypatch.setattr(task_prefetch, "extend_in_file", count_and_extend)
    folder = tmp_path / "files"
    folder.mkdir()
    opened = HistoryBuffer(history, torch.device("cpu"), folder=folder)
    for round in range(ROUNDS):
        opened.add(round, history[round])
    history.fault = AssertionError("a task is read again")
    found = opened.gather([39, 0, 8, 17])
    assert isinstance(found, _task_stacks.StackedTasks)
    history.fault = None
    assert all(same(task, history[round]) for task, round in zip(found, [39, 0, 8, 17], strict=True))
    assert sorted({*files}) == [8, 16, 32], "four and eight tasks are in memory"
    assert not [*folder.iterdir()]
    opened.close()


@pytest.mark.parametrize("reason", ["share of the disk", "full disk"])
def test_without_room_for_files_tasks_are_read_one_by_one(
    history: ObservedHistory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reason: str
) -> None:
    monkeypatch.setattr(_task_stacks, "FIRST_ROWS", 4)
    monkeypatch.setattr(task_prefetch, "STACK_BYTES", 0)

    def refuse(*given: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    if reason == "full disk":
        monkeypatch.setattr(os, "posix_fallocate", refuse)
    else:
        monkeypatch.setattr(task_prefetch, "MOST_OF_DISK", 0.0)
    opened = HistoryBuffer(history, torch.device("cpu"), folder=tmp_path)
    for round in range(ROUNDS):
        opened.add(round, history[round])
    assert isinstance(opened.gather([0, 3]), _task_stacks.StackedTasks)
    assert all(same(task, history[round]) for task, round in zip(opened.gather([0, 30]), [0, 30], strict=True))
    opened.close()
