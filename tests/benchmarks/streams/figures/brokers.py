"""Ingest tasks durably from Redis Streams and Kafka, where they already wait."""

import time
from pathlib import Path
from typing import Any

from streams.history.history import History
from streams.ingest.ingest import Ingest
from streams.sources import kafka, redis
from streams.spec import Limits, TaskSpec
from tests.benchmarks.streams.figure import Figure, make_figure
from tests.benchmarks.streams.load import SIDE, WAYS, make_bodies
from tests.support.daemon import wait_for
from tests.support.servers import Kafka, Redis

TITLE = "Ingest from brokers: one source reads, commits and acknowledges 16 KiB tasks that wait in the broker"
TASKS, ROUNDS = 8_000, 3
SPEC = TaskSpec(x_shape=(1, SIDE, SIDE), y="class", ways=WAYS)


def measure(folder: Path) -> dict[str, Any]:
    """Return tasks per second of each broker, and of a Kafka consumer that discards them, for each round."""
    found: dict[str, Any] = {"redis": [], "kafka": [], "thrown away": []}
    servers: dict[str, Any] = {"redis": Redis(folder / "redis"), "kafka": Kafka(folder / "kafka")}
    try:
        for server in servers.values():
            server.start()
        for number in range(ROUNDS):
            for name, server in servers.items():
                source = {"redis": _fill_redis, "kafka": _fill_kafka}[name](server, f"tasks-{number}")
                found[name].append(_measure_rate(folder / f"{name}-{number}", source))
            found["thrown away"].append(_measure_discarding(servers["kafka"], f"tasks-{number}"))
    finally:
        for server in servers.values():
            server.stop()
    return found


def _fill_redis(server: Redis, stream: str) -> Any:
    some = make_bodies()
    with server.client() as client:
        for first in range(0, TASKS, 100):
            pipeline = client.pipeline(transaction=False)
            for number in range(first, first + 100):
                pipeline.xadd(stream, {"id": f"t{number}", "body": some[number % len(some)]})
            pipeline.execute()
    return redis.create_source(redis.Settings(url=server.url, stream=stream), SPEC, "broker", 0)


def _fill_kafka(server: Kafka, topic: str) -> Any:
    from confluent_kafka import Producer

    some = make_bodies()
    server.make_topic(topic)
    producer = Producer({"bootstrap.servers": server.brokers, "linger.ms": 20})
    for number in range(TASKS):
        producer.produce(topic, some[number % len(some)], headers=[("id", f"t{number}".encode())])
        if number % 500 == 499:
            producer.flush(60)
    assert producer.flush(60) == 0
    return kafka.create_source(kafka.Settings(brokers=server.brokers, topic=topic), SPEC, "broker", 0)


def _measure_rate(folder: Path, source: Any) -> float:
    """Ingest all tasks, and return tasks per second from the first read to the last commit."""
    with History.open(folder, write=True) as history:
        ingest = Ingest(history, SPEC, Limits(backlog=1 << 40), lambda: 0, lambda *_: None, lambda *_: None)
        began = time.perf_counter()
        ingest.pull("broker", source)
        wait_for("all tasks are committed", lambda: len(history) >= TASKS, 300)
        taken = time.perf_counter() - began
        ingest.close()
    return TASKS / taken


def _measure_discarding(server: Kafka, topic: str) -> float:
    """Read the same tasks with the client library and its default settings, discard them, and return the rate."""
    from confluent_kafka import Consumer, TopicPartition

    consumer = Consumer({"bootstrap.servers": server.brokers, "group.id": "none", "enable.auto.commit": False})
    consumer.assign([TopicPartition(topic, 0, 0)])
    began, read = time.perf_counter(), 0
    while read < TASKS:
        read += sum(message.error() is None for message in consumer.consume(500, 0.1))
    taken = time.perf_counter() - began
    consumer.close()
    return TASKS / taken


def make_figures(samples: dict[str, Any]) -> list[Figure]:
    """Return the figures of the samples."""
    pairs = zip(samples["kafka"], samples["thrown away"], strict=True)
    return [
        *(
            make_figure(f"durable tasks per second from {name}", samples[name], 3000, least=True)
            for name in ("redis", "kafka")
        ),
        make_figure("from kafka / by a consumer that discards them", [kept / thrown for kept, thrown in pairs]),
    ]
