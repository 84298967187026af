"""Read a Kafka topic as a source, and create clients for sources and producers."""

import json
import logging
import re
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

from confluent_kafka import OFFSET_BEGINNING, Consumer, KafkaError, KafkaException, Message, TopicPartition

from streams.brokers.gaps import GapLog
from streams.brokers.login import PREFETCH_BYTES, KafkaLogin, LoginRefused, hide_secrets, read_properties
from streams.brokers.settings import KafkaSettings as Settings
from streams.types import Arrival, Gap

AUTH_ERRORS = (
    KafkaError._AUTHENTICATION,
    KafkaError._SSL,
    KafkaError.SASL_AUTHENTICATION_FAILED,
    KafkaError.TOPIC_AUTHORIZATION_FAILED,
    KafkaError.CLUSTER_AUTHORIZATION_FAILED,
)
"""Codes of errors which mean that the broker refuses the login, or that its certificate is not trusted."""


Client = TypeVar("Client")


_BROKER = re.compile(r"(?:(?:PLAINTEXT|SSL|SASL_PLAINTEXT|SASL_SSL)://)?(?:[\w.-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]{1,5})?")


RESERVED = {
    **dict.fromkeys(("bootstrap.servers", "metadata.broker.list"), "it is `brokers`, or the address"),
    **dict.fromkeys(
        ("socket.timeout.ms", "socket.connection.setup.timeout.ms", "message.timeout.ms", "delivery.timeout.ms"),
        "it is `timeout_seconds`, or fixed for a producer",
    ),
    **dict.fromkeys(
        ("enable.auto.commit", "auto.commit.enable", "enable.auto.offset.store", "auto.offset.reset"),
        "the history holds the positions",
    ),
    **dict.fromkeys(("max.poll.interval.ms", "enable.partition.eof"), "the source may pause for days"),
    **dict.fromkeys(
        ("isolation.level", "check.crcs", "acks", "request.required.acks"), "nothing may be lost or doubled"
    ),
}
"""Settings of librdkafka that ``properties_file`` may not have, and why."""


def read_login(login: KafkaLogin) -> dict[str, str]:
    """Return the settings of librdkafka in the properties file of a login.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if a line is not a setting, or the setting is reserved; the message names the line or the setting.
    """
    found = {} if login.properties_file is None else read_properties(login.properties_file)
    for name in found:
        if name in RESERVED:
            raise ValueError(
                f"properties_file: {login.properties_file} sets {name}, which is reserved: {RESERVED[name]}"
            )
    return found


def check_brokers(brokers: str) -> None:
    """Raise ``ValueError`` unless each of some brokers, separated by commas, is a host and a port."""
    for broker in brokers.split(","):
        if not _BROKER.fullmatch(broker.strip()):
            shown = hide_secrets(f"//{broker.strip()}").removeprefix("//")
            raise ValueError(f"brokers: {shown!r} is not host:port; a login belongs into properties_file")


def make_client(make: Callable[[dict[str, Any]], Client], settings: Mapping[str, Any]) -> Client:
    """Create a client of librdkafka; raise ``ValueError`` for an unknown setting."""
    try:
        return make(dict(settings))
    except KafkaException as error:
        raise ValueError(f"properties_file: {error.args[0].str()}") from error


def find_auth_error(errors: Sequence[KafkaError]) -> KafkaError | None:
    """Return the last of ``errors`` with a code of ``AUTH_ERRORS``, None if there is none."""
    return next((error for error in reversed(errors) if error.code() in AUTH_ERRORS), None)


POLL_SECONDS = 0.2


DAY_MILLISECONDS = 86_400_000


_log = logging.getLogger(__name__)


Positions = dict[int, int]
"""The offset of the next message by partition."""


class KafkaTopic:
    """A ``TaskSource`` that ``ReportsLag`` and ``ReportsGaps``; its cursor is JSON: the next offset by partition."""

    def __init__(self, settings: Settings, name: str) -> None:
        """Take the settings and the source's name; ``read`` connects."""
        self._settings, self._name = settings, name
        self._gaps = GapLog(name)

    def listen_for_gaps(self, listener: Callable[[Gap], None]) -> None:
        """Call ``listener`` with the offsets that a broker deleted before they were read."""
        self._gaps.listen(listener)

    def read(self, after: str | None) -> Iterator[Arrival | None]:
        """Yield the messages after the positions; a partition without a position is read from its first message.

        Raises:
            ConnectionError: if no broker answers or has the topic.
            KafkaException: if a broker refuses a later request.
            LoginRefused: if the brokers refuse the login, or their certificates are not trusted.
            ValueError: if the topic ends before a position, so that it is not the topic that was read before.
        """
        positions = _positions(after)
        with self._consumer() as consumer:
            assigned: set[int] = set()
            refreshed = None
            while True:
                if refreshed is None or time.monotonic() - refreshed >= self._settings.refresh_seconds:
                    self._assign(consumer, positions, assigned)
                    refreshed = time.monotonic()
                message = consumer.poll(POLL_SECONDS)
                if message is None:
                    yield None
                elif (error := message.error()) is not None:
                    raise KafkaException(error)
                else:
                    yield self._make_arrival(message, positions)

    def lag(self, after: str | None) -> int | None:
        """Return the number of offsets between the positions and the ends of the partitions."""
        positions = _positions(after)
        with self._consumer() as consumer:
            ranges = {
                partition: self._offset_range(consumer, partition) for partition in self._list_partitions(consumer)
            }
        return sum(max(0, high - max(low, positions.get(partition, 0))) for partition, (low, high) in ranges.items())

    def _list_partitions(self, consumer: Consumer) -> list[int]:
        """Return the topic's current partitions."""
        topic, seconds = self._settings.topic, self._settings.timeout_seconds
        try:
            found = consumer.list_topics(topic, timeout=seconds).topics[topic]
            if found.error is not None:
                raise KafkaException(found.error)
        except KafkaException as error:
            raise ConnectionError(f"{self._settings.brokers}, topic {topic}: {error.args[0].str()}") from error
        return sorted(found.partitions)

    def _offset_range(self, consumer: Consumer, partition: int) -> tuple[int, int]:
        """Return the first offset of a partition, and the offset after its last."""
        topic_partition = TopicPartition(self._settings.topic, partition)
        low, high = consumer.get_watermark_offsets(topic_partition, timeout=self._settings.timeout_seconds)
        return low, high

    def _assign(self, consumer: Consumer, positions: Positions, assigned: set[int]) -> None:
        """Start reading new partitions, and check that known partitions still contain their positions."""
        topic, new_partitions = self._settings.topic, []
        for partition in self._list_partitions(consumer):
            position = positions.get(partition)
            if position is not None:
                low, high = self._offset_range(consumer, partition)
                if position > high:
                    raise ValueError(
                        f"partition {partition} of {topic} ends at {high}, before the committed position {position}: "
                        "was the topic recreated? Give the source another name to read it from its start"
                    )
                if position < low and partition not in assigned:
                    self._note_gap(partition, position, low)
                    position = low
            if partition not in assigned:
                new_partitions.append(
                    TopicPartition(topic, partition, OFFSET_BEGINNING if position is None else position)
                )
                assigned.add(partition)
        if new_partitions:
            consumer.incremental_assign(new_partitions)

    def _note_gap(self, partition: int, position: int, low: int) -> None:
        """Note that the offsets from ``position`` to ``low`` - 1 are gone."""
        gap = Gap(f"partition {partition} of {self._settings.topic}", str(position), str(low - 1), low - position)
        self._gaps.note(
            gap,
            f"the broker deleted the offsets {gap.first} to {gap.last} of {gap.where} before they were read; "
            f"reading continues at {low}: increase the topic's retention",
        )

    def _make_arrival(self, message: Message, positions: Positions) -> Arrival:
        partition, offset = message.partition(), message.offset()
        assert partition is not None, "a message without an error has one"
        assert offset is not None, "a message without an error has one"
        positions[partition] = offset + 1
        headers: Any = message.headers() or ()
        ids = [value for key, value in headers if key == "id" and value is not None]
        id = _text(ids[-1]) if ids else f"{self._settings.topic}:{partition}:{offset}"
        return Arrival(id, _bytes(message.value()), self._name, _cursor(positions))

    @contextmanager
    def _consumer(self) -> Iterator[Consumer]:
        errors: deque[KafkaError] = deque(maxlen=32)

        def on_error(error: KafkaError) -> None:
            errors.append(error)
            _log.warning("the source %s: %s", self._name, error.str())

        consumer = _make_consumer(self._settings, on_error)
        try:
            yield consumer
        except ConnectionError as error:
            consumer.poll(POLL_SECONDS)  # lets the library report its errors
            auth_error = find_auth_error(errors)
            if auth_error is None:
                raise
            raise LoginRefused(
                f"{self._settings.brokers} refuses the login or is not trusted: {auth_error.str()}"
            ) from error
        finally:
            consumer.close()


def check_properties(settings: Settings) -> None:
    """Check the brokers and the settings in ``properties_file`` without connecting.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if a broker is invalid, a line is not a setting, or a setting is reserved or unknown to librdkafka.
    """
    check_brokers(settings.brokers)
    _make_consumer(replace(settings, brokers="127.0.0.1:1"), lambda error: None).close()


def _make_consumer(settings: Settings, on_error: Callable[[KafkaError], None]) -> Consumer:
    """Create a consumer that stores no positions, prefetches little and tolerates pauses of days."""
    milliseconds = round(1000 * settings.timeout_seconds)
    config: dict[str, Any] = {
        "socket.timeout.ms": milliseconds,
        "socket.connection.setup.timeout.ms": milliseconds,
        "socket.keepalive.enable": True,
        "reconnect.backoff.max.ms": 2000,
        "fetch.wait.max.ms": 200,
        "fetch.max.bytes": PREFETCH_BYTES,
        "fetch.queue.backoff.ms": 10,  # the wait when the fetch queue is full; the default is a second
        "queued.max.messages.kbytes": PREFETCH_BYTES // 1024,
        "isolation.level": "read_committed",
        "check.crcs": True,
        "log_level": 2,
        "group.id": "online-meta",  # required by the library, but unused
        **read_login(settings),
        "bootstrap.servers": settings.brokers,
        "enable.auto.commit": False,
        "enable.auto.offset.store": False,
        "auto.offset.reset": "error",
        "max.poll.interval.ms": DAY_MILLISECONDS,
        "error_cb": on_error,
    }
    return make_client(Consumer, config)


def _positions(cursor: str | None) -> Positions:
    """Parse the positions in a cursor; raise ``ValueError`` if it is not a cursor of this source."""
    if cursor is None:
        return {}
    try:
        return {int(partition): int(offset) for partition, offset in json.loads(cursor).items()}
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"the position {cursor!r} is not one of Kafka, such as '{{\"0\":12}}'") from error


def _cursor(positions: Positions) -> str:
    return json.dumps({str(partition): positions[partition] for partition in sorted(positions)}, separators=(",", ":"))


def _text(value: str | bytes) -> str:
    return value if isinstance(value, str) else value.decode(errors="replace")


def _bytes(value: str | bytes | None) -> bytes:
    return value.encode() if isinstance(value, str) else value or b""
