"""Tasks from a Kafka topic; the position of each partition is kept in the ledger, and no consumer group is asked.

A message's value is the task as ``wire.encode`` writes it, its header ``id`` the task's id; without one that is
"<topic>:<partition>:<offset>". Partitions that are added later are found.
"""

from streams.brokers.login import translate_import_errors
from streams.brokers.settings import KafkaSettings as Settings
from streams.spec import TaskSpec
from streams.types import TaskSource

__all__ = ["Settings", "create_source"]


def create_source(settings: Settings, spec: TaskSpec, name: str, seed: int) -> TaskSource | None:
    """Return the stream of the messages, each partition in its order.

    Raises:
        ImportError: if the client library is not installed.
        OSError: if ``properties_file`` cannot be read.
        ValueError: if one of its settings is not known, or it is not made of settings.
    """
    with translate_import_errors("kafka"):
        from streams.brokers.kafka import KafkaTopic, check_properties
    check_properties(settings)
    return KafkaTopic(settings, name)
