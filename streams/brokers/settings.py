"""The options of the sources that read from a broker, apart from what needs its client library."""

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge, Gt, Le, MinLen

from streams.brokers.login import KafkaLogin, Login, NatsLogin


@dataclass(frozen=True)
class RedisSettings(Login):
    """Options of ``[[source]] kind = "redis"``, beside those of a ``Login``.

    Attributes:
        url: of the server and database, redis:// or, for TLS, rediss://; a user may stand in it, a password may not.
        stream: the key of the stream.
        group: the consumer group; it is made when there is none. Give each run a group of its own: what is given to
            one consumer of a group is given to no other.
        consumer: by which name this daemon reads; left out: the source's.
        claim_seconds: after how long what another consumer of the group was given, and did not acknowledge, is taken
            over.
        delete: whether entries are deleted from the stream when they are durable; no other group may read it then.
        batch: how many entries are asked for at once, at most.
        timeout_seconds: how long Redis may take to answer before the connection is given up.
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
    """Options of ``[[source]] kind = "kafka"``, beside those of a ``KafkaLogin``.

    Attributes:
        brokers: where to begin, host:port or several between commas.
        topic: what is read, all its partitions.
        refresh_seconds: how often new partitions are looked for.
        timeout_seconds: how long a broker may take to answer before the connection is given up.
    """

    brokers: Annotated[str, MinLen(1)] = "127.0.0.1:9092"
    topic: Annotated[str, MinLen(1)] = "tasks"
    refresh_seconds: Annotated[float, Gt(0)] = 30.0
    timeout_seconds: Annotated[float, Ge(2)] = 10.0


@dataclass(frozen=True)
class NatsSettings(NatsLogin):
    """Options of ``[[source]] kind = "nats"``, beside those of a ``NatsLogin``.

    Attributes:
        servers: an address, nats:// or, for TLS, tls://, or several between commas; nobody is named in it.
        stream: the name of the stream.
        subject: which of its subjects are read, * and > allowed; left out: all.
        batch: how many messages are asked for at once, at most.
        timeout_seconds: how long the server may take to answer before the connection is given up.
    """

    servers: Annotated[str, MinLen(1)] = "nats://127.0.0.1:4222"
    stream: Annotated[str, MinLen(1)] = "tasks"
    subject: Annotated[str, MinLen(1)] | None = None
    batch: Annotated[int, Ge(1), Le(10_000)] = 256
    timeout_seconds: Annotated[float, Ge(1)] = 10.0
