"""The guarantees of every source that reads from a broker, on real brokers and a failing network."""

import multiprocessing
import threading
from collections.abc import Callable, Iterator
from multiprocessing.context import BaseContext
from pathlib import Path

import pytest

from online_meta.types import Task
from streams.formats import wire
from streams.producers import SubmitError, open_producer
from streams.types import ReportsLag
from tests.support.brokers import MODULES, Broker, ingest_until_killed, running
from tests.support.daemon import wait_for

Make = Callable[[int], Task]


@pytest.fixture(scope="module", params=sorted(MODULES))
def broker(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    one = Broker(request.param, tmp_path_factory.mktemp(request.param))
    yield one
    one.close()


@pytest.fixture
def stream(broker: Broker, request: pytest.FixtureRequest) -> str:
    """An empty stream for the test alone."""
    name = "".join(letter if letter.isalnum() else "-" for letter in request.node.name)
    broker.make_stream(name)
    return name


@pytest.fixture
def bodies(make_task: Make) -> Callable[[int, int], dict[str, bytes]]:
    def make(first: int, end: int) -> dict[str, bytes]:
        return {f"task-{n:04}": wire.encode(make_task(n)) for n in range(first, end)}

    return make


Bodies = Callable[[int, int], dict[str, bytes]]


def lag(broker: Broker, stream: str, after: str | None) -> int | None:
    source = broker.source(stream)
    assert isinstance(source, ReportsLag)
    return source.lag(after)


def test_every_message_arrives_once_in_order_and_the_lag_is_right(
    broker: Broker, stream: str, bodies: Bodies, tmp_path: Path
) -> None:
    produced = bodies(0, 40)
    broker.produce(stream, produced)
    assert lag(broker, stream, None) == 40
    with running(tmp_path, broker.source(stream)) as run:
        wait_for("all arrive", lambda: len(run.history) >= 40)
        ids = run.ids()
        assert sorted(ids) == list(produced)
        if broker.kind != "kafka":
            assert ids == list(produced)
        for round, id in enumerate(ids):
            assert run.history.payload(round) == produced[id]
        broker.produce(stream, bodies(40, 45))
        wait_for("more arrive", lambda: len(run.history) >= 45)
        wait_for("the lag is 0", lambda: lag(broker, stream, run.cursor) == 0)
        cursor = run.cursor
    broker.produce(stream, bodies(45, 52))
    assert lag(broker, stream, cursor) == 7
    with running(tmp_path, broker.source(stream)) as run:
        wait_for("the rest arrives", lambda: len(run.history) >= 52)
        assert sorted(run.ids()) == list(bodies(0, 52))
        assert len(run.counts.committed) == 7, "committed messages are not read again"


@pytest.fixture(scope="session")
def processes() -> BaseContext:
    """A context for processes that start with torch imported, without this process's threads and connections."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.support.brokers"])
    return context


@pytest.mark.parametrize("dies", ["before", "after"])
def test_a_kill_around_a_commit_loses_and_duplicates_nothing(
    broker: Broker, stream: str, bodies: Bodies, tmp_path: Path, dies: str, processes: BaseContext
) -> None:
    produced = bodies(0, 30)
    broker.produce(stream, produced)
    arguments = (broker.kind, broker.options(stream), tmp_path, dies, 3)
    child = processes.Process(target=ingest_until_killed, args=arguments)
    child.start()
    child.join(120)
    assert child.exitcode == -9
    with running(tmp_path, broker.source(stream)) as run:
        kept = len(run.history)
        wait_for("all arrive", lambda: len(run.history) >= 30)
        assert kept > 0 or dies == "before"
        broker.produce(stream, bodies(30, 31))
        wait_for("the next one arrives", lambda: len(run.history) >= 31)
        assert sorted(run.ids()) == list(bodies(0, 31))
        assert run.counts.rejected == []
        wait_for("the lag is 0", lambda: lag(broker, stream, run.cursor) == 0)


def produce_in_the_background(broker: Broker, stream: str, produced: dict[str, bytes]) -> threading.Thread:
    thread = threading.Thread(target=broker.produce, args=(stream, produced))
    thread.start()
    return thread


@pytest.fixture
def persistent_broker(
    broker: Broker, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Broker]:
    """A broker whose data survives its restart."""
    if broker.kind != "kafka":
        yield broker
        return
    one = Broker("kafka", tmp_path_factory.mktemp("kafka"), request.getfixturevalue("server"))
    yield one
    one.close()


@pytest.mark.parametrize("fault", ["cut", "swallow", "kill"])
def test_a_temporary_failure_of_network_or_broker_loses_and_duplicates_nothing(
    broker: Broker,
    request: pytest.FixtureRequest,
    bodies: Bodies,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    fault: str,
) -> None:
    broker = request.getfixturevalue("persistent_broker") if fault == "kill" else broker
    fail, recover = {
        "cut": (broker.network.cut, broker.network.heal),
        "swallow": (broker.network.swallow, broker.network.heal),
        "kill": (broker.server.kill, broker.server.start),
    }[fault]
    broker.make_stream(fault)
    produced = bodies(0, 120)
    broker.produce(fault, dict(list(produced.items())[:40]))
    with running(tmp_path, broker.source(fault)) as run:
        wait_for("some arrive", lambda: len(run.history) >= 10)
        fail()
        producing = produce_in_the_background(broker, fault, dict(list(produced.items())[40:]))
        if fault != "cut":
            wait_for("the failure is logged", lambda: "the source broker" in caplog.text)
        else:
            with pytest.raises(Exception):  # noqa: B017, PT011 - the error differs by library
                lag(broker, fault, run.cursor)
        recover()
        producing.join()
        wait_for("all arrive", lambda: len(run.history) >= 120)
        assert sorted(run.ids()) == list(produced)


def test_invalid_messages_are_counted_and_skipped(broker: Broker, stream: str, bodies: Bodies, tmp_path: Path) -> None:
    (good,) = bodies(0, 1).values()
    broker.produce_raw(stream, b"nonsense", {"id": b"poison"})
    broker.produce_raw(stream, None, {})
    broker.produce_raw(stream, good, {"id": b"not an id"})
    broker.produce_raw(stream, good, {})
    broker.produce_raw(stream, good, {"id": b"good"})
    with running(tmp_path, broker.source(stream)) as run:
        wait_for("the valid tasks arrive", lambda: len(run.history) >= 2)
        own, named = run.ids()
        assert named == "good"
        assert own.startswith(f"{stream}:"), "the id is derived from the position"
        assert sorted(reason for _, reason in run.counts.rejected) == ["bad_id", "unreadable", "unreadable"]
        wait_for("the lag is 0", lambda: lag(broker, stream, run.cursor) == 0)


def test_a_task_without_an_id_is_identified_by_its_position(
    broker: Broker, stream: str, bodies: Bodies, tmp_path: Path
) -> None:
    (good,) = bodies(0, 1).values()
    for _ in range(3):
        broker.produce_raw(stream, good, {})
    (first, *_), (again, *_) = (read(broker, stream, 3) for _ in range(2))
    assert first == again


def read(broker: Broker, stream: str, count: int, after: str | None = None) -> list[tuple[str, str | None]]:
    """Return ids and cursors of the first arrivals after a position."""
    found: list[tuple[str, str | None]] = []
    arrivals = broker.source(stream).read(after)
    wait_for("enough messages arrive", lambda: _take(arrivals, found) >= count)
    arrivals.close()
    return found


def _take(arrivals: Iterator, found: list[tuple[str, str | None]]) -> int:
    if (arrival := next(arrivals)) is not None:
        found.append((arrival.id, arrival.cursor))
    return len(found)


def test_a_stream_can_be_read_again_from_each_of_its_positions(broker: Broker, stream: str, bodies: Bodies) -> None:
    broker.produce(stream, bodies(0, 12))
    whole = read(broker, stream, 12)
    for place in (0, 5, 10):
        rest = read(broker, stream, 11 - place, whole[place][1])
        assert sorted(id for id, _ in rest) == sorted(id for id, _ in whole[place + 1 :])


def test_backpressure_pauses_reading_without_dropping_the_consumer(
    broker: Broker, stream: str, bodies: Bodies, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    broker.produce(stream, bodies(0, 30))
    with running(tmp_path, broker.source(stream, timeout_seconds=60), backlog=4) as run:
        wait_for("the backlog is full", lambda: len(run.history) == 4)
        for learned in range(2, 27, 4):
            run.counts.learned = learned
            wait_for("one more", lambda learned=learned: len(run.history) == learned + 4)
        assert sorted(run.ids()) == list(bodies(0, 30))
    assert "again" not in caplog.text, "the source never failed"


def test_an_unreachable_broker_is_reported(
    broker: Broker, stream: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    broker.network.cut()
    try:
        with running(tmp_path, broker.source(stream)):
            wait_for("the failure is logged", lambda: "cannot be read, trying again" in caplog.text)
        with pytest.raises(SubmitError) as caught:
            open_producer(broker.url(stream), retry_seconds=0.1).send("a", b"")
        assert caught.value.reason == "unreachable"
    finally:
        broker.network.heal()


def test_a_position_of_another_kind_is_refused(broker: Broker, stream: str) -> None:
    with pytest.raises(ValueError, match="the position 'x-y' is no"):
        next(broker.source(stream).read("x-y"))
