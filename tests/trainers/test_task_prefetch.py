"""Reading ahead: the same tasks, sooner; bounded; what goes wrong does so where it is asked for."""

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

from online_meta.types import Task
from streams.formats import wire
from streams.history.errors import HistoryDamaged
from streams.history.history import History
from streams.sources.sinusoid import make_task
from streams.types import Record
from tests.support.daemon import wait_for
from trainers.loop import task_prefetch
from trainers.loop.task_prefetch import HistoryBuffer, TaskPrefetcher

ROUNDS = 40


class Told(History):
    """A history that notes which rounds were read together, and that can be made to wait or to fail."""

    reads: list[list[int]]
    gate: threading.Event | None = None
    fault: Exception | None = None

    def tasks(self, rounds: Sequence[int]) -> list[Task]:
        self.reads = [*getattr(self, "reads", []), list(rounds)]
        if self.gate is not None:
            assert self.gate.wait(60)
        if self.fault is not None:
            raise self.fault
        return super().tasks(rounds)

    @property
    def read(self) -> list[int]:
        return [round for rounds in getattr(self, "reads", []) for round in rounds]


@pytest.fixture
def history(tmp_path: Path) -> Iterator[Told]:
    with Told.open(tmp_path / "history", write=True) as opened:
        bodies = [wire.encode(make_task(0, t, 5, 5)) for t in range(ROUNDS)]
        opened.append([Record(f"t{t}", body, wire.digest(body), "s", None, 1.0) for t, body in enumerate(bodies)])
        yield opened


@pytest.fixture
def past(history: Told) -> Iterator[HistoryBuffer]:
    opened = HistoryBuffer(history, torch.device("cpu"))
    yield opened
    if history.gate is not None:
        history.gate.set()
    opened.close()


def same(one: Task, other: Task) -> bool:
    pairs = zip((*one.support, *one.query), (*other.support, *other.query), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def test_what_is_expected_is_read_before_it_is_asked_for(history: Told, past: HistoryBuffer) -> None:
    wanted = [7, 3, 3, 30]
    past.prefetch("me", wanted)
    wait_for("it is read", lambda: sorted(history.read) == [3, 7, 30])
    past.prefetch("me", [*wanted, 5])
    wait_for("what is new is read", lambda: history.read[3:] == [5])
    given = [past[round] for round in (*wanted, 5)]
    assert len(history.read) == 4, "nothing was read twice, or when it was asked for"
    assert all(same(task, history[round]) for task, round in zip(given, (*wanted, 5), strict=True))
    assert same(past[7], history[7]), "what was given away is read anew"


def test_each_reader_has_its_own_expectations(history: Told, past: HistoryBuffer) -> None:
    past.prefetch("me", [1, 2])
    past.prefetch("you", [2, 3])
    wait_for("all are read", lambda: sorted(set(history.read)) == [1, 2, 3])
    before = len(history.read)
    past.prefetch("me", [4])
    wait_for("the new one is read", lambda: 4 in history.read)
    assert same(past[3], history[3])
    assert same(past[2], history[2])
    assert len(history.read) == before + 1, "yours were kept"


def test_who_asks_for_what_is_being_read_waits_for_it(history: Told, past: HistoryBuffer) -> None:
    history.gate = threading.Event()
    past.prefetch("me", [1])
    wait_for("it is being read", lambda: history.read == [1])
    given: list[Task] = []
    asking = threading.Thread(target=lambda: given.append(past[1]))
    asking.start()
    history.gate.set()
    asking.join(60)
    assert same(given[0], history[1])
    assert history.read == [1]


@pytest.mark.parametrize("most", ["tasks", "bytes"])
def test_what_waits_to_be_asked_for_is_bounded(
    most: str, history: Told, past: HistoryBuffer, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = sum(tensor.nbytes for batch in history[0] for tensor in batch)
    monkeypatch.setattr(task_prefetch, "MAX_TASKS", 9 if most == "tasks" else ROUNDS)
    monkeypatch.setattr(task_prefetch, "MAX_BYTES", 9 * size if most == "bytes" else 1_000_000)
    past.prefetch("me", range(ROUNDS))
    at_most = 9 if most == "tasks" else 16  # what is being read when the bytes are reached comes on top
    wait_for("it stops", lambda: len(history.read) == at_most)
    given = [past[round] for round in range(ROUNDS)]
    assert all(same(task, history[round]) for round, task in enumerate(given))


@pytest.mark.parametrize("round", [12, ROUNDS])
def test_what_cannot_be_read_fails_where_it_is_asked_for(history: Told, past: HistoryBuffer, round: int) -> None:
    with history.borrow_writer() as writer:
        writer.execute("UPDATE payloads SET payload = zeroblob(50) WHERE round = 12")
    past.prefetch("me", [11, round, 13])
    wait_for("it was tried", lambda: set(history.read) == {11, round, 13})
    assert same(past[11], history[11])
    with pytest.raises((HistoryDamaged, IndexError), match=f"round {round}"):
        past[round]
    assert same(past[13], history[13])
    past.prefetch("me", [14])
    wait_for("it goes on", lambda: 14 in history.read)


def test_its_thread_ends(history: Told) -> None:
    def threads() -> list[str]:
        return [thread.name for thread in threading.enumerate() if thread.name == "read-ahead"]

    reading = TaskPrefetcher(history)
    assert threads() == [], "it begins when something is expected"
    reading.prefetch("me", [1])
    assert threads() == ["read-ahead"]
    reading.close()
    assert threads() == []
    reading.prefetch("me", [2])
    assert threads() == []
    assert reading.take(2) is None
