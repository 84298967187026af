"""Define the options of sources that read from a broker, without importing client libraries."""

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge, Gt, Le, MinLen

from streams.brokers.login import KafkaLogin, Login, NatsLogin


@dataclass(frozen=True)
class RedisSettings(Login):
    """Options of ``[[source]] kind = "redis"``, in addition to those of ``Login``.

    Attributes:
        url: the server and database, redis:// or, for TLS, rediss://. It may contain a user but no password.
        stream: the key of the stream.
        group: the consumer group, created if it does not exist. Give each run its own group: an entry delivered to one
            consumer of a group is not delivered to the others.
        consumer: the name of this consumer in the group; by default, the name of the source.
        claim_seconds: the age after which unacknowledged entries of other consumers are claimed.
        delete: whether to delete entries from the stream once they are durable; no other group may then read it.
        batch: the largest number of entries per request.
        timeout_seconds: how long Redis may take to answer before the connection is closed.
    """

    url: Annotated[str, MinLen(1)] = "redis://127.0.0.1:6379/0"
    stream: Annotated[str, MinLen(1)] = "tasks"
    group: Annotated[str, MinLen(1)] = "online-meta"
    consumer: Annotated[str, MinLen(1)] | None = None
    claim_seconds: Annotated[float, Gt(0)] = 60.0
    delete: bool = False
    batch: Annotated[int, Ge(1), Le(10_000)] = 256
    timeout_seconds: Annotated[float, Ge(1)] = 10.0


@dataclass(frozen=True)
class KafkaSettings(KafkaLogin):
    """Options of ``[[source]] kind = "kafka"``, in addition to those of ``KafkaLogin``.

    Attributes:
        brokers: bootstrap servers, host:port or several separated by commas.
        topic: the topic, of which all partitions are read.
        refresh_seconds: the interval between two checks for new partitions.
        timeout_seconds: how long a broker may take to answer before the connection is closed.
    """

    brokers: Annotated[str, MinLen(1)] = "127.0.0.1:9092"
    topic: Annotated[str, MinLen(1)] = "tasks"
    refresh_seconds: Annotated[float, Gt(0)] = 30.0
    timeout_seconds: Annotated[float, Ge(2)] = 10.0


@dataclass(frozen=True)
class NatsSettings(NatsLogin):
    """Options of ``[[source]] kind = "nats"``, in addition to those of ``NatsLogin``.

    Attributes:
        servers: an address, nats:// or, for TLS, tls://, or several separated by commas, without users.
        stream: the name of the stream.
        subject: the subjects to read, with wildcards * and >; by default all.
        batch: the largest number of messages per request.
        timeout_seconds: how long the server may take to answer before the connection is closed.
    """

    servers: Annotated[str, MinLen(1)] = "nats://127.0.0.1:4222"
    stream: Annotated[str, MinLen(1)] = "tasks"
    subject: Annotated[str, MinLen(1)] | None = None
    batch: Annotated[int, Ge(1), Le(10_000)] = 256
    timeout_seconds: Annotated[float, Ge(1)] = 10.0
