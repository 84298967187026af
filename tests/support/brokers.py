"""A common interface to the three brokers: make a stream, produce to it, read it into a history."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from streams.history.history import History
from streams.ingest.ingest import Ingest
from streams.producers import open_producer
from streams.sources import kafka, nats, redis
from streams.spec import Limits, TaskSpec
from streams.types import TaskSource
from tests.support.ingesting import Counts
from tests.support.object_store import BucketServer
from tests.support.proxy import Proxy
from tests.support.servers import Kafka, Nats, Redis, Server, StoredKafka

SPEC = TaskSpec(x_shape=(2,), y="class", ways=3)
SERVERS: dict[str, type[Server]] = {"redis": Redis, "kafka": Kafka, "nats": Nats}
MODULES: dict[str, ModuleType] = {"redis": redis, "kafka": kafka, "nats": nats}


class Broker:
    """A broker behind a proxy of its own, as a source connects to it."""

    def __init__(self, kind: str, folder: Path, bucketed: BucketServer | None = None) -> None:
        """Start the broker; with ``bucketed`` (Kafka only) its data survives a restart."""
        self.kind = kind
        self.network = Proxy()
        self.server: Any = (
            SERVERS[kind](folder, self.network.port)
            if bucketed is None
            else StoredKafka(folder, self.network.port, bucketed)
        )
        self.network.to = self.server.port
        self.server.start()

    def close(self) -> None:
        self.network.close()
        self.server.stop()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.network.port}"

    def make_stream(self, name: str, partitions: int = 2) -> None:
        """Make an empty stream; only streams of Kafka have partitions."""
        if self.kind == "kafka":
            self.server.make_topic(name, partitions)
        if self.kind == "nats":
            self.server.ask(lambda stream: stream.add_stream(name=name, subjects=[name]))

    def url(self, name: str) -> str:
        """Return the URL that a producer writes to."""
        if self.kind == "redis":
            return f"redis://{self.address}/0?stream={name}"
        return f"{self.kind}://{self.address}/{name}"

    def options(self, name: str, **more: Any) -> dict[str, Any]:
        """Return the settings of a source that reads the stream and notices a dead connection quickly."""
        where = {
            "redis": {"url": f"redis://{self.address}/0", "stream": name},
            "kafka": {"brokers": self.address, "topic": name},
            "nats": {"servers": f"nats://{self.address}", "stream": name},
        }[self.kind]
        return {**where, "timeout_seconds": 2, **more}

    def source(self, name: str, **more: Any) -> TaskSource:
        """Open a source that reads the stream."""
        module = MODULES[self.kind]
        opened = module.create_source(module.Settings(**self.options(name, **more)), SPEC, "broker", 0)
        assert opened is not None
        if isinstance(self.server, StoredKafka):
            opened._offset_range = lambda consumer, partition: (0, self.server.end(name, partition))
        return opened

    def produce(self, name: str, bodies: dict[str, bytes]) -> None:
        """Write tasks, and return when all are acknowledged."""
        producer = open_producer(self.url(name), retry_seconds=60)
        try:
            for id, body in bodies.items():
                producer.send(id, body)
        finally:
            producer.close()

    def produce_raw(self, name: str, body: bytes | None, headers: dict[str, bytes]) -> None:
        """Write an entry with any body and headers, valid or not."""
        if self.kind == "redis":
            fields = dict(headers) if body is None else {"body": body, **headers}
            with self.server.client() as client:
                client.xadd(name, fields or {"nothing": "x"})
        elif self.kind == "kafka":
            from confluent_kafka import Producer

            producer = Producer({"bootstrap.servers": self.address})
            producer.produce(name, body, partition=0, headers=list(headers.items()))
            assert producer.flush(30) == 0
        else:
            text_headers = {key: value.decode() for key, value in headers.items()} or None
            self.server.ask(lambda stream: stream.publish(name, body or b"", headers=text_headers))


class Run:
    """A history filled by one source."""

    def __init__(self, history: History, counts: Counts, ingest: Ingest) -> None:
        self.history, self.counts, self.ingest = history, counts, ingest

    def ids(self) -> list[str]:
        return [self.history.entry(round).id for round in range(len(self.history))]

    @property
    def cursor(self) -> str | None:
        return self.history.cursor("broker")


@contextmanager
def running(folder: Path, source: TaskSource, **limits: int) -> Iterator[Run]:
    """Read a source into the history under ``folder`` until the end of the block."""
    counts = Counts()
    with History.open(folder / "history", write=True) as history:
        ingest = Ingest(
            history,
            SPEC,
            Limits(**limits),
            lambda: counts.learned,
            lambda *event: counts.rejected.append(event),
            lambda *event: counts.committed.append(event),
        )
        try:
            ingest.pull("broker", source)
            yield Run(history, counts, ingest)
        finally:
            ingest.close()


def ingest_until_killed(kind: str, options: dict[str, Any], folder: Path, dies: str, when: int) -> None:
    """Ingest in a separate process until it kills itself ``before`` or ``after`` the n-th commit."""

    class Dying(History):
        appended = 0

        def append(self, records: Any) -> Any:
            self.appended += 1
            if dies == "before" and self.appended == when:
                os.kill(os.getpid(), signal.SIGKILL)
            answers = super().append(records)
            if dies == "after" and self.appended == when:
                os.kill(os.getpid(), signal.SIGKILL)
            return answers

    module = MODULES[kind]
    source = module.create_source(module.Settings(**options), SPEC, "broker", 0)
    history = Dying.open(folder / "history", write=True)
    limits = Limits(commit_batch=3)
    Ingest(history, SPEC, limits, lambda: 0, lambda *_: None, lambda *_: None).pull("broker", source)
    threading.Event().wait(60)
