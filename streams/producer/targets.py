"""Which producer an address asks for."""

from typing import Protocol
from urllib.parse import SplitResult, urlsplit

from streams.arrivals import Receipt
from streams.extras import naming_extra
from streams.producer.errors import PATIENCE

SCHEMES = {
    "http": "http://127.0.0.1:8780",
    "https": "https://meta.example:8780",
    "redis": "redis://127.0.0.1:6379/0?stream=tasks",
    "rediss": "rediss://127.0.0.1:6379/0?stream=tasks",
    "kafka": "kafka://127.0.0.1:9092/tasks",
    "nats": "nats://127.0.0.1:4222/tasks",
    "file": "file:///var/spool/tasks",
}
"""Schemes of addresses, each with an example."""


class Producer(Protocol):
    """Brings tasks to one target."""

    def send(self, id: str, body: bytes) -> Receipt | None:
        """Return once the target has the task durably: with its receipt, or None where no daemon has answered.

        It may be called again with the same id and body: the history keeps one round.

        Raises ``SubmitError`` when the target refuses the task or patience ends.
        """

    def close(self) -> None:
        """Let go of the target."""


def open_producer(url: str, token: str | None = None, patience: float = PATIENCE) -> Producer:
    """Return the producer for an address.

    Args:
        url: http(s)://host:port of a daemon, redis://host:port/db?stream=name, kafka://host:port/topic,
            nats://host:port/stream-or-subject, file:///folder.
        token: the bearer token of a daemon that asks for one.
        patience: seconds after which no further try to send a task is begun.

    Raises:
        ValueError: if the address is none of these.
        ImportError: if the client library that it needs is not installed; the message says how to get it.
    """
    parts = split_address(url)
    if parts.scheme == "file":
        from streams.producer.files import FileProducer

        return FileProducer(_path(parts))
    if parts.scheme in ("http", "https"):
        from streams.producer.http import HttpProducer, connect

        return HttpProducer(url, connect(url, token), patience)
    return _open_broker(parts, patience)


def split_address(url: str) -> SplitResult:
    """Return the parts of an address that a producer may be opened for; raises ``ValueError`` for any other."""
    try:
        parts = urlsplit(url)
        known = parts.scheme == "file" or (parts.scheme in SCHEMES and bool(parts.hostname) and parts.port != 0)
    except ValueError:  # of the port
        known = parts.scheme == "kafka" and "," in parts.netloc
    if not known:
        examples = [example for scheme, example in SCHEMES.items() if scheme not in ("https", "rediss")]
        raise ValueError(f"{url!r} is no address: write it like {', '.join(examples)}")
    return parts


def _open_broker(parts: SplitResult, patience: float) -> Producer:
    if parts.scheme in ("redis", "rediss"):
        with naming_extra("redis"):
            from streams.producer.redis import RedisProducer
        return RedisProducer(parts, patience)
    if parts.scheme == "kafka":
        with naming_extra("kafka"):
            from streams.producer.kafka import KafkaProducer
        return KafkaProducer(parts.netloc, _path(parts).strip("/"), patience)
    with naming_extra("nats"):
        from streams.producer.nats import NatsProducer
    return NatsProducer(f"{parts.scheme}://{parts.netloc}", _path(parts).strip("/"), patience)


def _path(parts: SplitResult) -> str:
    if parts.scheme == "file" and parts.netloc:
        raise ValueError(f"{parts.geturl()!r} names a host: write three slashes, like {SCHEMES['file']}")
    if not parts.path.strip("/"):
        raise ValueError(f"{parts.geturl()!r} lacks its end: write it like {SCHEMES[parts.scheme]}")
    return parts.path
