"""Open the producer for an address."""

from typing import Protocol
from urllib.parse import SplitResult, urlsplit

from streams.brokers.login import KafkaLogin, NatsLogin, read_query, split_login, translate_import_errors
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
"""The schemes of addresses, each with an example."""


class Producer(Protocol):
    """A connection that sends tasks to one target."""

    def send(self, id: str, body: bytes) -> Receipt | None:
        """Send a task, and return once the target has stored it durably.

        The call may be repeated with the same id and body: the history stores one round.

        Returns:
            The receipt of a daemon; None from any other target.

        Raises:
            SubmitError: if the target rejects the task or no attempt succeeds in time.
        """

    def close(self) -> None:
        """Disconnect from the target."""


def open_producer(url: str, token: str | None = None, retry_seconds: float = RETRY_SECONDS) -> Producer:
    """Open the producer for an address.

    Args:
        url: http(s)://host:port of a daemon, redis://host:port/db?stream=name, kafka://host:port/topic,
            nats://host:port/stream-or-subject or file:///folder. The address of a broker may end with the login, see
            ``streams.brokers.login``: rediss://user@host/0?stream=name&password_file=/path&ca_file=/path.
        token: the bearer token, if the daemon requires one.
        retry_seconds: seconds after which no further attempt to send a task begins.

    Raises:
        ValueError: if the address or a file that it names is invalid.
        OSError: if a file that it names cannot be read.
        ImportError: if the required client library is not installed; the message says how to install it.
    """
    parts = split_address(url)
    if parts.scheme == "file":
        read_query(parts.query, ())
        from streams.producers.files import FileProducer

        return FileProducer(_path(parts))
    if parts.scheme in ("http", "https"):
        from streams.producers.http import HttpProducer, connect

        return HttpProducer(url, connect(url, token), retry_seconds)
    return _open_broker(parts, retry_seconds)


def split_address(url: str) -> SplitResult:
    """Split the address of a target; raise ``ValueError`` if no producer exists for it."""
    try:
        parts = urlsplit(url)
        known = parts.scheme == "file" or (parts.scheme in SCHEMES and bool(parts.hostname) and parts.port != 0)
    except ValueError:  # for an invalid port
        known = parts.scheme == "kafka" and "," in parts.netloc
    if not known:
        examples = [example for scheme, example in SCHEMES.items() if scheme not in ("https", "rediss", "tls")]
        raise ValueError(f"{url!r} is not an address of a target, such as {', '.join(examples)}")
    return parts


def _open_broker(parts: SplitResult, retry_seconds: float) -> Producer:
    if parts.scheme in ("redis", "rediss"):
        with translate_import_errors("redis"):
            from streams.producers.redis import RedisProducer
        return RedisProducer(parts, retry_seconds)
    if parts.scheme == "kafka":
        with translate_import_errors("kafka"):
            from streams.producers.kafka import KafkaProducer
        return KafkaProducer(
            parts.netloc, _path(parts).strip("/"), split_login(KafkaLogin, parts.query)[0], retry_seconds
        )
    with translate_import_errors("nats"):
        from streams.producers.nats import NatsProducer
    server, login = f"{parts.scheme}://{parts.netloc}", split_login(NatsLogin, parts.query)[0]
    return NatsProducer(server, _path(parts).strip("/"), login, retry_seconds)


def _path(parts: SplitResult) -> str:
    if parts.scheme == "file" and parts.netloc:
        raise ValueError(f"{parts.geturl()!r} names a host: write three slashes, as in {SCHEMES['file']}")
    if not parts.path.strip("/"):
        raise ValueError(f"{parts.geturl()!r} has no path: write it like {SCHEMES[parts.scheme]}")
    return parts.path
