"""Which producer an address asks for."""

from dataclasses import fields
from typing import Protocol
from urllib.parse import SplitResult, parse_qsl, urlsplit

from streams.brokers.login import KafkaLogin, LoginType, NatsLogin, split_login, translate_import_errors
from streams.producers.errors import RETRY_SECONDS
from streams.types import Receipt

SCHEMES = {
    "http": "http://127.0.0.1:8780",
    "https": "https://meta.example:8780",
    "redis": "redis://127.0.0.1:6379/0?stream=tasks",
    "rediss": "rediss://127.0.0.1:6379/0?stream=tasks",
    "kafka": "kafka://127.0.0.1:9092/tasks",
    "nats": "nats://127.0.0.1:4222/tasks",
    "tls": "tls://127.0.0.1:4222/tasks",
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


def open_producer(url: str, token: str | None = None, retry_seconds: float = RETRY_SECONDS) -> Producer:
    """Return the producer for an address.

    Args:
        url: http(s)://host:port of a daemon, redis://host:port/db?stream=name, kafka://host:port/topic,
            nats://host:port/stream-or-subject, file:///folder. Those of brokers may end with how to log in, see
            ``streams.brokers.login``: rediss://user@host/0?stream=name&password_file=/path&ca_file=/path.
        token: the bearer token of a daemon that asks for one.
        retry_seconds: seconds after which no further try to send a task is begun.

    Raises:
        ValueError: if the address is none of these, or a file that it names does not hold what it is for.
        OSError: if a file that it names cannot be read.
        ImportError: if the client library that it needs is not installed; the message says how to get it.
    """
    parts = split_address(url)
    if parts.scheme == "file":
        from streams.producers.files import FileProducer

        return FileProducer(_path(parts))
    if parts.scheme in ("http", "https"):
        from streams.producers.http import HttpProducer, connect

        return HttpProducer(url, connect(url, token), retry_seconds)
    return _open_broker(parts, retry_seconds)


def split_address(url: str) -> SplitResult:
    """Return the parts of an address that a producer may be opened for; raises ``ValueError`` for any other."""
    try:
        parts = urlsplit(url)
        known = parts.scheme == "file" or (parts.scheme in SCHEMES and bool(parts.hostname) and parts.port != 0)
    except ValueError:  # of the port
        known = parts.scheme == "kafka" and "," in parts.netloc
    if not known:
        examples = [example for scheme, example in SCHEMES.items() if scheme not in ("https", "rediss", "tls")]
        raise ValueError(f"{url!r} is no address: write it like {', '.join(examples)}")
    return parts


def _open_broker(parts: SplitResult, retry_seconds: float) -> Producer:
    if parts.scheme in ("redis", "rediss"):
        with translate_import_errors("redis"):
            from streams.producers.redis import RedisProducer
        return RedisProducer(parts, retry_seconds)
    if parts.scheme == "kafka":
        with translate_import_errors("kafka"):
            from streams.producers.kafka import KafkaProducer
        return KafkaProducer(parts.netloc, _path(parts).strip("/"), _parse_login(KafkaLogin, parts), retry_seconds)
    with translate_import_errors("nats"):
        from streams.producers.nats import NatsProducer
    server, login = f"{parts.scheme}://{parts.netloc}", _parse_login(NatsLogin, parts)
    return NatsProducer(server, _path(parts).strip("/"), login, retry_seconds)


def _parse_login(kind: type[LoginType], parts: SplitResult) -> LoginType:
    """Return the login in the query of an address; raises ``ValueError`` if anything else stands there."""
    login, others = split_login(kind, dict(parse_qsl(parts.query)))
    if others:
        known = ", ".join(field.name for field in fields(kind))
        raise ValueError(f"the address has no option {', '.join(others)}: it takes {known}")
    return login


def _path(parts: SplitResult) -> str:
    if parts.scheme == "file" and parts.netloc:
        raise ValueError(f"{parts.geturl()!r} names a host: write three slashes, like {SCHEMES['file']}")
    if not parts.path.strip("/"):
        raise ValueError(f"{parts.geturl()!r} lacks its end: write it like {SCHEMES[parts.scheme]}")
    return parts.path
