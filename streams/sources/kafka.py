"""Tasks from a Kafka topic; the position of each partition is kept in the ledger, and no consumer group is asked.

A message's value is the task as ``wire.encode`` writes it, its header ``id`` the task's id; without one that is
"<topic>:<partition>:<offset>". Partitions that are added later are found.
"""

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge, Gt, MinLen

from streams.arrivals import TaskSource
from streams.extras import naming_extra
from streams.sources._client import read_properties
from streams.spec import TaskSpec


@dataclass(frozen=True)
class Settings:
    """Options of ``[[source]] kind = "kafka"``.

    Attributes:
        brokers: where to begin, host:port or several between commas.
        topic: what is read, all its partitions.
        properties_file: a file of "name = value" lines, further settings of librdkafka: how to log in, for example.
        refresh_seconds: how often new partitions are looked for.
        timeout_seconds: how long a broker may take to answer before the connection is given up.
    """

    brokers: Annotated[str, MinLen(1)] = "127.0.0.1:9092"
    topic: Annotated[str, MinLen(1)] = "tasks"
    properties_file: str | None = None
    refresh_seconds: Annotated[float, Gt(0)] = 30.0
    timeout_seconds: Annotated[float, Ge(2)] = 10.0


def open(settings: Settings, spec: TaskSpec, name: str, seed: int) -> TaskSource | None:
    """Return the stream of the messages, each partition in its order.

    Raises:
        ImportError: if the client library is not installed.
        OSError: if ``properties_file`` cannot be read.
        ValueError: if one of its settings is not known, or it is not made of settings.
    """
    with naming_extra("kafka"):
        from streams.sources._kafka_topic import KafkaTopic, check_properties
    properties = {} if settings.properties_file is None else read_properties(settings.properties_file)
    check_properties(properties)
    return KafkaTopic(settings, properties, name)
