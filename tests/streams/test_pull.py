import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from streams.history.history import History
from streams.ingest.ingest import Ingest
from streams.spec import Limits, TaskSpec
from streams.types import Arrival
from tests.support.ingesting import DEADLINE, Arrive, Faulty, Open, until


class ScriptedSource:
    """A source of tasks 0 .. all-1 that fails once at each given task, and records where each read started."""

    def __init__(self, make: Callable[[int], Arrival], all: int, breaks: tuple[int, ...] = ()) -> None:
        self.make, self.all, self.breaks = make, all, set(breaks)
        self.reads_after: list[str | None] = []

    def read(self, after: str | None) -> Iterator[Arrival | None]:
        self.reads_after.append(after)
        for n in range(0 if after is None else int(after) + 1, self.all):
            if n in self.breaks:
                self.breaks.discard(n)
                raise ConnectionError("the broker went away")
            yield self.make(n)._replace(cursor=str(n))
        while True:
            yield None


@pytest.fixture
def rejected() -> list[tuple[str, str]]:
    return []


@pytest.fixture
def pulling(history: History, spec: TaskSpec, rejected: list[tuple[str, str]]) -> Iterator[Open]:
    opened: list[Ingest] = []

    def open_one(learned: Callable[[], int] = lambda: 0, **limits: int) -> Ingest:
        count = lambda *said: rejected.append(said)  # noqa: E731
        opened.append(Ingest(history, spec, Limits(**limits), learned, count, lambda *said: None))
        return opened[-1]

    yield open_one
    for one in opened:
        one.close()


def test_tasks_of_a_source_are_stored_in_order_under_its_name(pulling: Open, history: History, arrive: Arrive) -> None:
    one = pulling()
    one.pull("p", ScriptedSource(arrive, 30))
    until(lambda: len(history) == 30)
    assert [history.entry(n).id for n in range(30)] == [f"task-{n}" for n in range(30)]
    assert {history.entry(n).source for n in range(30)} == {"p"}
    assert history.cursor("p") == "29"
    with pytest.raises(ValueError, match="'p' is already being read"):
        one.pull("p", ScriptedSource(arrive, 1))


def test_a_failed_source_is_read_again_after_the_last_commit(
    pulling: Open, history: History, arrive: Arrive, caplog: pytest.LogCaptureFixture
) -> None:
    source = ScriptedSource(arrive, 12, breaks=(0, 5, 6))
    with caplog.at_level(logging.WARNING):
        pulling().pull("p", source)
        until(lambda: len(history) == 12)
    assert [history.entry(n).id for n in range(12)] == [f"task-{n}" for n in range(12)]
    assert source.reads_after[:2] == [None, None]
    assert len(source.reads_after) == 4
    assert "the broker went away" in caplog.text


def test_a_restart_resumes_after_the_last_committed_task(pulling: Open, history: History, arrive: Arrive) -> None:
    first = pulling()
    first.pull("p", ScriptedSource(arrive, 7))
    until(lambda: len(history) == 7)
    first.close()
    source = ScriptedSource(arrive, 9)
    pulling().pull("p", source)
    until(lambda: len(history) == 9)
    assert source.reads_after == ["6"]


def test_rejected_and_conflicting_arrivals_are_counted_and_skipped(
    pulling: Open, history: History, arrive: Arrive, rejected: list[tuple[str, str]]
) -> None:
    def make(n: int) -> Arrival:
        if n in (2, 4):
            return arrive(n)._replace(body=b"nonsense")
        return arrive(n)._replace(id="task-0") if n == 5 else arrive(n)

    pulling().pull("p", ScriptedSource(make, 8))
    until(lambda: history.cursor("p") == "7" and len(rejected) == 3)
    assert [history.entry(n).id for n in range(len(history))] == ["task-0", "task-1", "task-3", "task-6", "task-7"]
    assert sorted(rejected) == [("p", "conflict"), ("p", "unreadable"), ("p", "unreadable")]


def test_backpressure_stops_the_reading(pulling: Open, history: History, arrive: Arrive) -> None:
    learned = [0]
    read = [0]

    def make(n: int) -> Arrival:
        read[0] = n
        return arrive(n)

    pulling(lambda: learned[0], backlog=3).pull("p", ScriptedSource(make, 100))
    until(lambda: len(history) == 3)
    for done in range(1, 20):
        learned[0] = done
        until(lambda done=done: len(history) == done + 3)
        assert read[0] <= done + 3


def test_closing_is_prompt_for_idle_broken_and_blocked_sources(pulling: Open, history: History, arrive: Arrive) -> None:
    class Broken:
        def read(self, after: str | None) -> Iterator[Arrival | None]:
            raise ConnectionError("never there")

    one = pulling(backlog=2)
    one.pull("idle", ScriptedSource(arrive, 0))
    one.pull("broken", Broken())
    one.pull("blocked", ScriptedSource(arrive, 10))
    until(lambda: len(history) == 2)
    one.close()
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith(("pull-", "ingest-"))]
    assert len(history) == 2


def test_a_source_that_ends_is_read_again(pulling: Open, history: History, arrive: Arrive) -> None:
    class Ending:
        def read(self, after: str | None) -> Iterator[Arrival | None]:
            first = 0 if after is None else int(after) + 1
            yield from (arrive(n, cursor=str(n)) for n in range(first, min(first + 2, 4)))

    pulling().pull("p", Ending())
    until(lambda: len(history) == 4)


def test_a_source_left_in_a_blocking_read_does_not_hang_the_close(
    pulling: Open, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    release, entered = threading.Event(), threading.Event()

    class Stuck:
        def read(self, after: str | None) -> Iterator[Arrival | None]:
            entered.set()
            release.wait(DEADLINE)
            yield None

    one = pulling()
    one.pull("stuck", Stuck())
    assert entered.wait(DEADLINE)
    with caplog.at_level(logging.WARNING):
        one.close(timeout=0.05)
    assert "stuck does not return from reading" in caplog.text
    release.set()


class AckingSource(ScriptedSource):
    """A source that records its acknowledgements, and can fail once on one."""

    def __init__(self, make: Callable[[int], Arrival], all: int, fails: bool = False) -> None:
        super().__init__(make, all)
        self.acked: list[str] = []
        self.refused: dict[str, str] = {}
        self.fails = fails

    def ack(self, arrivals: Sequence[Arrival]) -> None:
        if self.fails:
            self.fails = False
            raise ConnectionError("the broker does not listen")
        self.acked += [arrival.id for arrival in arrivals]
        self.refused |= {arrival.id: arrival.rejection.reason for arrival in arrivals if arrival.rejection}
        assert {arrival.body for arrival in arrivals} == {b""}


def test_durable_and_rejected_arrivals_are_acknowledged(pulling: Open, history: History, arrive: Arrive) -> None:
    def make(n: int) -> Arrival:
        if n == 3:
            return arrive(n)._replace(id="task-1")
        return arrive(n)._replace(body=b"nonsense") if n == 2 else arrive(n)

    source = AckingSource(make, 200)
    pulling().pull("p", source)
    until(lambda: len(source.acked) == 200)
    assert sorted(source.acked) == sorted(["task-1", *(f"task-{n}" for n in range(200) if n != 3)])
    assert source.refused == {"task-2": "unreadable", "task-1": "conflict"}
    assert len(history) == 198


def test_an_arrival_that_was_not_stored_is_not_acknowledged(open_ingest: Open, faulty: Faulty, arrive: Arrive) -> None:
    faulty.poison = "task-3"
    source = AckingSource(arrive, 6)
    open_ingest().pull("p", source)
    until(lambda: len(source.acked) == 5)
    assert "task-3" not in source.acked


def test_a_source_that_fails_on_an_acknowledgement_is_read_again(
    pulling: Open, history: History, arrive: Arrive, caplog: pytest.LogCaptureFixture
) -> None:
    source = AckingSource(arrive, 8, fails=True)
    pulling().pull("p", source)
    until(lambda: len(history) == 8 and "does not listen" in caplog.text and len(source.reads_after) == 2)
    assert history.cursor("p") == "7"


def test_the_last_arrivals_are_acknowledged_at_close(pulling: Open, history: History, arrive: Arrive) -> None:
    source = AckingSource(arrive, 30)
    one = pulling()
    one.pull("p", source)
    until(lambda: len(history) > 0)
    one.close()
    assert len(source.acked) == len(history)
