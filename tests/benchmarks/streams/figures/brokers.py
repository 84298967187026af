"""Durable ingest from Redis Streams and Kafka, of tasks that wait there."""

import time
from pathlib import Path
from typing import Any

from streams.history.history import History
from streams.ingest.ingest import Ingest
from streams.sources import kafka, redis
from streams.spec import Limits, TaskSpec
from tests.benchmarks.streams.figure import Figure, figure
from tests.benchmarks.streams.load import SIDE, WAYS, bodies
from tests.support.daemon import wait_for
from tests.support.servers import Kafka, Redis

TITLE = "Ingest from brokers: one source reads, commits and acknowledges 16 KiB tasks that wait in the broker"
TASKS, ROUNDS = 8_000, 3
SPEC = TaskSpec(x_shape=(1, SIDE, SIDE), y="class", ways=WAYS)


def measure(folder: Path) -> dict[str, Any]:
    """Return tasks a second of each broker, for each round, and of a Kafka consumer that throws them away."""
    found: dict[str, Any] = {"redis": [], "kafka": [], "thrown away": []}
    servers: dict[str, Any] = {"redis": Redis(folder / "redis"), "kafka": Kafka(folder / "kafka")}
    try:
        for server in servers.values():
            server.start()
        for number in range(ROUNDS):
            for name, server in servers.items():
                source = {"redis": _fill_redis, "kafka": _fill_kafka}[name](server, f"tasks-{number}")
                found[name].append(_rate(folder / f"{name}-{number}", source))
            found["thrown away"].append(_rate_of_throwing_away(servers["kafka"], f"tasks-{number}"))
    finally:
        for server in servers.values():
            server.stop()
    return found


def _fill_redis(server: Redis, stream: str) -> Any:
    some = bodies()
    with server.client() as client:
        for first in range(0, TASKS, 100):
            pipeline = client.pipeline(transaction=False)
            for number in range(first, first + 100):
                pipeline.xadd(stream, {"id": f"t{number}", "body": some[number % len(some)]})
            pipeline.execute()
    return redis.create_source(redis.Settings(url=server.url, stream=stream), SPEC, "broker", 0)


def _fill_kafka(server: Kafka, topic: str) -> Any:
    from confluent_kafka import Producer

    some = bodies()
    server.make_topic(topic)
    producer = Producer({"bootstrap.servers": server.brokers, "linger.ms": 20})
    for number in range(TASKS):
        producer.produce(topic, some[number % len(some)], headers=[("id", f"t{number}".encode())])
        if number % 500 == 499:
            producer.flush(60)
    assert producer.flush(60) == 0
    return kafka.create_source(kafka.Settings(brokers=server.brokers, topic=topic), SPEC, "broker", 0)


def _rate(folder: Path, source: Any) -> float:
    """Read all that waits; the time goes from the beginning of the reading to the last commit."""
    with History.open(folder, write=True) as history:
        ingest = Ingest(history, SPEC, Limits(backlog=1 << 40), lambda: 0, lambda *_: None, lambda *_: None)
        began = time.perf_counter()
        ingest.pull("broker", source)
        wait_for("all tasks are committed", lambda: len(history) >= TASKS, 300)
        taken = time.perf_counter() - began
        ingest.close()
    return TASKS / taken


def _rate_of_throwing_away(server: Kafka, topic: str) -> float:
    """Read the same as quickly as the client library can with settings of its own, and keep nothing."""
    from confluent_kafka import Consumer, TopicPartition

    consumer = Consumer({"bootstrap.servers": server.brokers, "group.id": "none", "enable.auto.commit": False})
    consumer.assign([TopicPartition(topic, 0, 0)])
    began, read = time.perf_counter(), 0
    while read < TASKS:
        read += sum(message.error() is None for message in consumer.consume(500, 0.1))
    taken = time.perf_counter() - began
    consumer.close()
    return TASKS / taken


def judge(samples: dict[str, Any]) -> list[Figure]:
    """Return the figures."""
    pairs = zip(samples["kafka"], samples["thrown away"], strict=True)
    return [
        *(
            figure(f"durable tasks per second from {name}", samples[name], 3000, least=True)
            for name in ("redis", "kafka")
        ),
        figure("from kafka / by a consumer that discards them", [kept / thrown for kept, thrown in pairs]),
    ]
