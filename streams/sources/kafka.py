"""Read tasks from a Kafka topic; the ledger stores the position in each partition, and no consumer group is used.

The value of a message is the task as ``wire.encode`` writes it, and its header ``id`` is the task's id. Without the
header the id is "<topic>:<partition>:<offset>". Partitions that are added later are found.
"""

from streams.brokers.login import translate_import_errors
from streams.brokers.settings import KafkaSettings as Settings
from streams.spec import TaskSpec
from streams.types import TaskSource

__all__ = ["Settings", "create_source"]


def create_source(settings: Settings, spec: TaskSpec, name: str, seed: int) -> TaskSource | None:
    """Return the stream of the topic's messages; the messages of each partition keep their order.

    Raises:
        ImportError: if the client library is not installed.
        OSError: if ``properties_file`` cannot be read.
        ValueError: if ``properties_file`` is malformed or has an unknown setting.
    """
    with translate_import_errors("kafka"):
        from streams.brokers.kafka import KafkaTopic, check_properties
    check_properties(settings)
    return KafkaTopic(settings, name)
