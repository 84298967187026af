"""Behaviour specific to Kafka: partitions, and positions that the broker does not store."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import streams.brokers.kafka
from online_meta.types import Task
from streams.formats import wire
from streams.producers import open_producer
from streams.sources import kafka
from tests.support.brokers import SPEC, Broker, running
from tests.support.daemon import wait_for
from tests.support.object_store import BucketServer

Bodies = Callable[[int, int], dict[str, bytes]]


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    one = Broker("kafka", tmp_path_factory.mktemp("kafka"))
    yield one
    one.close()


@pytest.fixture
def bodies(make_task: Callable[[int], Task]) -> Bodies:
    return lambda first, end: {f"task-{n:03}": wire.encode(make_task(n)) for n in range(first, end)}


def test_each_partition_keeps_its_order(broker: Broker, bodies: Bodies, tmp_path: Path) -> None:
    """The cursors show which partition each round came from."""
    broker.make_stream("order", partitions=3)
    broker.produce("order", bodies(0, 40))
    seen: dict[str, list[str]] = {"0": [], "1": [], "2": []}
    before = dict.fromkeys(seen, 0)
    with running(tmp_path, broker.source("order")) as run:
        wait_for("all arrive", lambda: len(run.history) == 40)
        for round in range(40):
            entry = run.history.entry(round)
            after = {**before, **json.loads(entry.cursor or "{}")}
            (moved,) = [partition for partition in after if after[partition] != before[partition]]
            assert after[moved] == before[moved] + 1
            seen[moved].append(entry.id)
            before = after
    assert all(ids and ids == sorted(ids) for ids in seen.values())


def test_an_added_partition_is_read_from_its_start(
    bodies: Bodies, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, server: BucketServer
) -> None:
    broker = Broker("kafka", tmp_path_factory.mktemp("kafka"), server)
    try:
        broker.make_stream("grows", partitions=2)
        broker.produce("grows", bodies(0, 20))
        with running(tmp_path, broker.source("grows", refresh_seconds=0.1)) as run:
            wait_for("the first two are read", lambda: len(run.history) == 20)
            broker.server.add_partition("grows")
            wait_for("the third is seen", lambda: len(topics(broker)["grows"].partitions) == 3)
            broker.produce("grows", bodies(20, 60))
            wait_for("all three are read", lambda: len(run.history) == 60)
            assert sorted(run.ids()) == list(bodies(0, 60))
            assert json.loads(run.cursor or "{}").keys() == {"0", "1", "2"}
        with running(tmp_path, broker.source("grows")) as run:
            broker.produce("grows", bodies(60, 70))
            wait_for("more messages arrive from all three", lambda: len(run.history) == 70)
            assert sorted(run.ids()) == list(bodies(0, 70))
    finally:
        broker.close()


def topics(broker: Broker) -> dict[str, Any]:
    admin = broker.server.admin()  # the client must outlive its answer
    return admin.list_topics(timeout=30).topics


def test_a_recreated_topic_is_not_silently_skipped(broker: Broker, bodies: Bodies) -> None:
    broker.make_stream("anew", partitions=1)
    broker.produce("anew", bodies(0, 3))
    with pytest.raises(ValueError, match="partition 0 of anew ends at 3, before the committed position 7"):
        next(broker.source("anew").read('{"0":7}'))


def test_messages_deleted_before_reading_are_reported(
    broker: Broker, bodies: Bodies, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The test broker deletes no messages, so the start of the partition is simulated."""
    broker.make_stream("short", partitions=1)
    broker.produce("short", bodies(0, 8))
    source = broker.source("short")
    monkeypatch.setattr(source, "_offset_range", lambda consumer, partition: (5, 8))
    assert source.lag('{"0":2}') == 3
    stream = source.read('{"0":2}')
    wait_for("a task arrives", lambda: (found := next(stream)) is not None and found.id == "task-005")
    assert "deleted the offsets 2 to 4 of partition 0 of short" in caplog.text
    stream.close()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("security.protocol\n", "line 1: write it as name = value"),
        ("# who\n\nno.such.setting = 1\n", "No such configuration property"),
        ("security.protocol = none\n", "properties_file: Invalid value"),
    ],
)
def test_an_unknown_setting_of_the_library_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "client.properties").write_text(text)
    with pytest.raises(ValueError, match=message):
        kafka.create_source(kafka.Settings(properties_file=str(tmp_path / "client.properties")), SPEC, "k", 0)


def test_library_settings_apply(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "client.properties").write_text("client.id = me\n")
    made: list[dict] = []
    monkeypatch.setattr(streams.brokers.kafka, "Consumer", made.append)
    streams.brokers.kafka._make_consumer(kafka.Settings(properties_file=str(tmp_path / "client.properties")), print)
    assert made[0]["client.id"] == "me"
    assert made[0]["enable.auto.commit"] is False


@pytest.mark.parametrize("name", streams.brokers.kafka.RESERVED)
def test_a_reserved_setting_of_the_library_is_refused(tmp_path: Path, name: str) -> None:
    file = tmp_path / "client.properties"
    file.write_text(f"{name} = 1\n")
    with pytest.raises(ValueError, match=f"sets {name}, which is reserved: "):
        kafka.create_source(kafka.Settings(properties_file=str(file)), SPEC, "k", 0)
    with pytest.raises(ValueError, match=f"sets {name}, which is reserved: "):
        open_producer(f"kafka://127.0.0.1:1/t?properties_file={file}")
