"""Entries that a broker deletes before they are read are noticed, logged once with their range, and counted."""

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest

import streams.brokers.redis
from deploy import daemon
from deploy.commands.status import gap_rows
from deploy.server.state import _list_gaps
from deploy.telemetry.facts import SourceFacts
from deploy.telemetry.health import _judge_source
from deploy.telemetry.prometheus import make_instruments
from online_meta.types import Task
from streams.formats import wire
from streams.ingest.source_reader import SourceStates
from streams.types import Arrival, Gap
from tests.support.brokers import Broker, running
from tests.support.daemon import wait_for

Bodies = Callable[[int, int], dict[str, bytes]]


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    one = Broker("redis", tmp_path_factory.mktemp("redis"))
    yield one
    one.close()


@pytest.fixture
def client(broker: Broker, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setattr(streams.brokers.redis, "BLOCK_MILLISECONDS", 1)
    with broker.server.client() as one:
        one.flushall()
        yield one


@pytest.fixture
def bodies(make_task: Callable[[int], Task]) -> Bodies:
    return lambda first, end: {f"task-{n:03}": wire.encode(make_task(n)) for n in range(first, end)}


class Reader:
    """A source that is read step by step; what it yields is acknowledged at once, as if it were durable."""

    def __init__(self, broker: Broker, name: str = "s", **settings: Any) -> None:
        self.gaps: list[Gap] = []
        self.ids: list[str] = []
        self.cursor: str | None = None
        self._open = lambda: broker.source(name, **settings)
        self.restart()

    def restart(self) -> None:
        """Start a new process's source at the committed position."""
        self.source = self._open()
        self.source.listen_for_gaps(self.gaps.append)
        self.stream = self.source.read(self.cursor)

    def reconnect(self) -> None:
        """Read the same source again at the committed position."""
        self.stream.close()
        self.stream = self.source.read(self.cursor)

    def take(self, most: int = 1000) -> list[str]:
        """Read and acknowledge up to ``most`` entries, until there is none now."""
        taken: list[Arrival] = []
        while len(taken) < most and (arrival := next(self.stream)) is not None:
            if hasattr(self.source, "ack"):
                self.source.ack([arrival])
            self.cursor = arrival.cursor
            taken.append(arrival)
        self.ids += [arrival.id for arrival in taken]
        return [arrival.id for arrival in taken]

    def lost(self) -> int:
        return sum(gap.entries or 0 for gap in self.gaps)


def add(client: Any, first: int, end: int) -> None:
    for n in range(first, end):
        client.xadd("s", {"id": f"t{n}", "body": b"x"}, id=f"{n + 1}-0")


@pytest.mark.parametrize("delete", [False, True])
def test_entries_trimmed_while_the_reader_is_away_are_noticed_once(
    broker: Broker, client: Any, caplog: pytest.LogCaptureFixture, delete: bool
) -> None:
    add(client, 0, 10)
    reader = Reader(broker, delete=delete)
    assert reader.take(3) == ["t0", "t1", "t2"]
    client.xtrim("s", maxlen=3, approximate=False)
    reader.restart()
    assert reader.take() == ["t7", "t8", "t9"]
    assert reader.gaps == [
        Gap("the stream s", "4-0", "5-0", 2),  # given to the reader before, and not stored
        Gap("the stream s", "after 5-0", "before 8-0", 2),
    ]
    assert [record.levelname for record in caplog.records] == ["ERROR", "ERROR"]
    assert "2 entries were trimmed or deleted before they were read: those after 5-0 and before 8-0" in caplog.text
    assert reader.source.lag(reader.cursor) == 0
    add(client, 10, 12)
    reader.restart()
    assert reader.take() == ["t10", "t11"]
    assert reader.lost() == 4


@pytest.mark.parametrize("delete", [False, True])
def test_entries_trimmed_under_a_running_reader_are_noticed(broker: Broker, client: Any, delete: bool) -> None:
    add(client, 0, 3)
    reader = Reader(broker, delete=delete)
    assert len(reader.take()) == 3
    add(client, 3, 9)
    client.xtrim("s", maxlen=2, approximate=False)
    assert reader.take() == ["t7", "t8"]
    assert reader.gaps == [Gap("the stream s", "after 3-0", "before 8-0", 4)]
    assert reader.source.lag(reader.cursor) == 0
    add(client, 9, 10)
    client.xdel("s", "10-0")
    add(client, 10, 11)
    assert reader.take() == ["t10"]
    assert reader.lost() == 5
    add(client, 11, 12)
    client.xtrim("s", maxlen=0, approximate=False)
    assert reader.take() == []
    reader.restart()
    assert reader.take() == []
    assert reader.lost() == 6
    reader.reconnect()
    assert reader.take() == []
    assert reader.lost() == 6


@pytest.mark.parametrize("delete", [False, True])
def test_entries_trimmed_after_they_were_read_are_no_gap(broker: Broker, client: Any, delete: bool) -> None:
    reader = Reader(broker, delete=delete)
    for first in range(0, 60, 6):
        add(client, first, first + 6)
        assert len(reader.take()) == 6
        client.xtrim("s", maxlen=first % 4, approximate=False)
        if first % 3 == 0:
            reader.restart()
    assert reader.gaps == []
    assert reader.source.lag(reader.cursor) == 0


@pytest.mark.parametrize("delete", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_what_is_read_and_what_is_missing_add_up(broker: Broker, client: Any, seed: int, delete: bool) -> None:
    """Producers add and trim, operators delete, the reader stops and starts at any moment."""
    choose, added = random.Random(seed), 0
    client.xgroup_create("s", "online-meta", "0-0", mkstream=True)
    reader = Reader(broker, delete=delete)
    reader.take()  # what is trimmed before the first reading is no gap
    for _ in range(60):
        action = choose.choice(["add", "add", "take", "trim", "delete", "restart", "reconnect"])
        if action == "add":
            more = choose.randint(1, 6)
            add(client, added, added + more)
            added += more
        elif action == "take":
            reader.take(choose.choice([1, 3, 1000]))
        elif action == "trim":
            client.xtrim("s", maxlen=choose.randint(0, 8), approximate=False)
        elif action == "delete" and added:
            client.xdel("s", f"{choose.randint(1, added)}-0")
        elif action == "restart" and reader.cursor is not None:
            reader.restart()
        elif action == "reconnect" and reader.cursor is not None:
            reader.reconnect()
    add(client, added, added + 1)  # a deleted last entry becomes known with the next one
    reader.reconnect()
    reader.take()
    assert len(set(reader.ids)) == len(reader.ids)
    assert len(reader.ids) + reader.lost() == added + 1, reader.gaps


def test_a_lost_group_leaves_the_number_unknown(broker: Broker, client: Any, caplog: pytest.LogCaptureFixture) -> None:
    add(client, 0, 5)
    reader = Reader(broker)
    reader.take(2)
    client.xgroup_destroy("s", "online-meta")
    client.xtrim("s", maxlen=1, approximate=False)
    reader.restart()
    assert reader.take() == ["t4"]
    assert reader.gaps == [Gap("the stream s", "after 2-0", "before 5-0", None)]
    assert "some entries may have been trimmed or deleted before they were read" in caplog.text


def test_deleted_entries_of_a_dead_consumer_are_noticed(broker: Broker, client: Any) -> None:
    reader = Reader(broker, claim_seconds=0.001)
    reader.take()
    add(client, 0, 4)
    client.xreadgroup("online-meta", "dead", {"s": ">"}, count=3)
    client.xdel("s", "1-0", "2-0")
    wait_for("the third is claimed", lambda: sorted(reader.ids) == ["t2", "t3"] or reader.take() is None)
    assert reader.lost() == 2


@pytest.fixture(scope="module")
def jetstream(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    one = Broker("nats", tmp_path_factory.mktemp("nats"))
    yield one
    one.close()


def test_messages_purged_under_a_running_reader_are_noticed(
    jetstream: Broker, bodies: Bodies, caplog: pytest.LogCaptureFixture
) -> None:
    jetstream.make_stream("live")
    jetstream.produce("live", bodies(0, 2))
    reader = Reader(jetstream, "live")
    wait_for("the first are read", lambda: len(reader.ids) == 2 or reader.take() is None)
    stopped = reader.cursor
    reader.stream.close()
    jetstream.produce("live", bodies(2, 9))
    jetstream.server.ask(lambda stream: stream.purge_stream("live", seq=6))
    jetstream.server.ask(lambda stream: stream.delete_msg("live", 8))
    reader.reconnect()
    wait_for("the others are read", lambda: len(reader.ids) == 5 or reader.take() is None)
    assert reader.ids[2:] == ["task-005", "task-006", "task-008"]
    assert reader.gaps == [Gap("the stream live", "3", "5", 3), Gap("the stream live", "8", "8", 1)]
    reader.cursor = stopped
    reader.reconnect()
    wait_for("they are read again", lambda: len(reader.ids) == 8 or reader.take() is None)
    assert reader.lost() == 4, "it is noted once"
    assert caplog.text.count("were deleted before they were read") == 2


def test_limits_of_a_stream_with_subjects_are_noticed(jetstream: Broker, bodies: Bodies) -> None:
    jetstream.server.ask(lambda stream: stream.add_stream(name="two", subjects=["two.*"]))
    for subject in ("two.a", "two.b", "two.a"):
        jetstream.server.ask(lambda stream, subject=subject: stream.publish(subject, b"x"))
    reader = Reader(jetstream, "two", subject="two.a")
    wait_for("both are read", lambda: len(reader.ids) == 2 or reader.take() is None)
    assert reader.gaps == [], "a message of another subject is no gap"
    for subject in ("two.b", "two.a", "two.a"):
        jetstream.server.ask(lambda stream, subject=subject: stream.publish(subject, b"x"))
    jetstream.server.ask(lambda stream: stream.purge_stream("two", seq=6))
    reader.reconnect()
    wait_for("the last is read", lambda: len(reader.ids) == 3 or reader.take() is None)
    assert reader.gaps == [Gap("the stream two", "4", "5", None)]


def test_messages_lost_to_the_retention_of_a_topic_are_counted_once(
    tmp_path: Path, bodies: Bodies, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The test broker deletes no messages, so the start of the partition is simulated."""
    kafka = Broker("kafka", tmp_path)
    try:
        kafka.make_stream("short", partitions=1)
        kafka.produce("short", bodies(0, 9))
        reader = Reader(kafka, "short")
        reader.cursor = '{"0":2}'
        for start in (5, 5, 7):
            monkeypatch.setattr(reader.source, "_offset_range", lambda consumer, partition, start=start: (start, 9))
            reader.reconnect()
            first = next(arrival for arrival in reader.stream if arrival is not None)
            assert first.id == f"task-{start:03}"
        where = "partition 0 of short"
        assert reader.gaps == [Gap(where, "2", "4", 3), Gap(where, "2", "6", 2)], "a gap that grows is counted once"
        assert "deleted the offsets 2 to 4 of partition 0 of short before they were read" in caplog.text
        reader.stream.close()
    finally:
        kafka.close()


def test_gaps_are_in_the_metrics_and_in_the_status(broker: Broker, client: Any, tmp_path: Path, bodies: Bodies) -> None:
    broker.produce("s", bodies(0, 3))
    metrics = CollectorRegistry()
    instruments = make_instruments(metrics)
    source = broker.source("s")
    with running(tmp_path, source) as run:
        run.ingest._on_gap = lambda *event: daemon._count_gap(instruments, *event)
        wait_for("the first are stored", lambda: len(run.history) == 3)
    with client.pipeline(transaction=True) as pipeline:
        for id, body in bodies(3, 9).items():
            pipeline.xadd("s", {"id": id, "body": body})
        pipeline.xtrim("s", maxlen=2, approximate=False)
        pipeline.execute()
    with running(tmp_path, source) as run:
        run.ingest._on_gap = lambda *event: daemon._count_gap(instruments, *event)
        wait_for("the others are stored", lambda: len(run.history) == 5)
        gaps = _list_gaps(SimpleNamespace(ingest=run.ingest))
    assert gaps["broker"]["lost_entries"] == 4
    assert gaps["broker"]["gaps"] == 1
    assert gaps["broker"]["last"]["entries"] == 4
    text = generate_latest(metrics).decode()
    assert 'online_meta_source_lost_entries_total{source="broker"} 4.0' in text
    assert 'online_meta_source_gaps_total{source="broker"} 1.0' in text


def test_the_health_of_a_source_says_what_was_lost() -> None:
    facts = SimpleNamespace(takes_http=True, pending=0, backlog_limit=10)
    check = _judge_source(facts, SourceFacts("queue", lost="its broker deleted 3 entries unread"))
    assert (check.name, check.level, check.evidence) == ("source:queue", "warn", "its broker deleted 3 entries unread")
    assert _judge_source(facts, SourceFacts("queue")).level == "ok"


def test_the_status_command_says_what_was_lost() -> None:
    states = SourceStates()
    states.note("queue", "read")
    states.note_gap("queue", Gap("the stream s", "2", "4", 3))
    states.note_gap("queue", Gap("the stream s", "9", "9", None))
    gaps = _list_gaps(SimpleNamespace(ingest=SimpleNamespace(source_states=states)))
    lost = "LOST 3 entries in 2 gaps, the last in the stream s, 9 to 9"
    assert gap_rows(gaps) == [("source queue", lost)]
