"""Behaviour specific to JetStream: sequence numbers, and consumers that the server may forget."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nats.errors
import pytest
from nats.aio.msg import Msg
from nats.js.api import RetentionPolicy
from nats.js.client import JetStreamContext

from online_meta.types import Task
from streams.formats import wire
from streams.producers import SubmitError, open_producer
from tests.support.brokers import Broker, running
from tests.support.daemon import wait_for

Bodies = Callable[[int, int], dict[str, bytes]]


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    one = Broker("nats", tmp_path_factory.mktemp("nats"))
    yield one
    one.close()


@pytest.fixture
def bodies(make_task: Callable[[int], Task]) -> Bodies:
    return lambda first, end: {f"task-{n:03}": wire.encode(make_task(n)) for n in range(first, end)}


def test_a_consumer_that_the_server_forgot_is_created_again(
    broker: Broker, bodies: Bodies, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    broker.make_stream("forgets")
    broker.produce("forgets", bodies(0, 5))
    with running(tmp_path, broker.source("forgets")) as run:
        wait_for("the first arrive", lambda: len(run.history) == 5)
        (consumer,) = broker.server.ask(lambda stream: stream.consumers_info("forgets"))
        broker.server.ask(lambda stream: stream.delete_consumer("forgets", consumer.name))
        broker.produce("forgets", bodies(5, 9))
        wait_for("the others arrive", lambda: len(run.history) == 9)
        assert run.ids() == list(bodies(0, 9))
    assert "failed and will be read again" in caplog.text


def test_a_message_lost_in_transit_is_read_again(
    broker: Broker, bodies: Bodies, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    broker.make_stream("drops")
    broker.produce("drops", bodies(0, 20))
    fetch, dropped = JetStreamContext.PullSubscription.fetch, []

    async def drop_one(self, *asked, **named):
        messages = await fetch(self, *asked, **named)
        if len(messages) > 2 and not dropped:
            dropped.append(messages.pop(1))
        return messages

    monkeypatch.setattr(JetStreamContext.PullSubscription, "fetch", drop_one)
    with running(tmp_path, broker.source("drops")) as run:
        wait_for("all arrive", lambda: len(run.history) == 20)
        assert run.ids() == list(bodies(0, 20))
    assert len(dropped) == 1
    assert "was lost in transit" in caplog.text


def test_a_fetch_timeout_between_two_requests_is_not_a_failure(
    broker: Broker, bodies: Bodies, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    broker.make_stream("slow")
    timeouts = iter([TimeoutError(), nats.errors.TimeoutError(), TimeoutError()])
    fetch = JetStreamContext.PullSubscription.fetch

    async def fetch_late(self: JetStreamContext.PullSubscription, *given: Any, **options: Any) -> list[Msg]:
        if (error := next(timeouts, None)) is not None:
            raise error
        return await fetch(self, *given, **options)

    monkeypatch.setattr(JetStreamContext.PullSubscription, "fetch", fetch_late)
    broker.produce("slow", bodies(0, 5))
    with running(tmp_path, broker.source("slow", timeout_seconds=60)) as run:
        wait_for("all arrive", lambda: len(run.history) == 5)
    assert next(timeouts, None) is None, "every timeout was raised"
    assert not caplog.text


def test_only_the_requested_subjects_are_read_and_counted(broker: Broker, bodies: Bodies, tmp_path: Path) -> None:
    broker.server.ask(lambda stream: stream.add_stream(name="many", subjects=["many.*"]))
    for subject, (first, end) in {"many.a": (0, 4), "many.b": (4, 7), "many.c": (7, 9)}.items():
        producer = open_producer(f"nats://{broker.address}/{subject}", retry_seconds=20)
        for id, body in bodies(first, end).items():
            producer.send(id, body)
        producer.close()
    source = broker.source("many", subject="many.b")
    assert source.lag(None) == 3
    assert source.lag("5") == 2
    with running(tmp_path, source) as run:
        wait_for("they arrive", lambda: len(run.history) == 3)
        assert run.ids() == list(bodies(4, 7))
        assert source.lag(run.cursor) == 0
    with pytest.raises(SubmitError, match=r"has the subjects many\.\*: name the one to publish on"):
        open_producer(f"nats://{broker.address}/many").send("a", b"")


def test_a_recreated_stream_is_not_silently_skipped(broker: Broker, bodies: Bodies) -> None:
    broker.make_stream("anew")
    broker.produce("anew", bodies(0, 3))
    with pytest.raises(ValueError, match="the stream anew ends at 3, before the committed position 7"):
        next(broker.source("anew").read("7"))


def test_messages_deleted_before_reading_are_reported(
    broker: Broker, bodies: Bodies, caplog: pytest.LogCaptureFixture
) -> None:
    broker.make_stream("short")
    broker.produce("short", bodies(0, 8))
    broker.server.ask(lambda stream: stream.purge_stream("short", seq=6))
    stream = broker.source("short").read("2")
    assert next(stream).id == "task-005"
    assert "the messages 3 to 5 of the stream short were deleted before they were read" in caplog.text
    stream.close()


def test_a_work_queue_stream_is_refused(broker: Broker) -> None:
    made = {"name": "queue", "subjects": ["queue"], "retention": RetentionPolicy.WORK_QUEUE}
    broker.server.ask(lambda stream: stream.add_stream(**made))
    with pytest.raises(Exception, match="explicit ack policy on workqueue stream"):
        next(broker.source("queue").read(None))
