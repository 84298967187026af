"""Read tasks from a Redis stream with a consumer group; entries are acknowledged only once they are durable.

Each entry has a field ``body``, the task as ``wire.encode`` writes it, and optionally a field ``id``. Without it the
task's id is "<stream>:<entry id>". The committed position is an entry id, from which the source can continue even if
the group is lost. Entries that Redis delivers twice are recognised by their ids.
"""

from streams.brokers.login import refuse_secrets, translate_import_errors
from streams.brokers.settings import RedisSettings as Settings
from streams.spec import TaskSpec
from streams.types import TaskSource

__all__ = ["Settings", "create_source"]


def create_source(settings: Settings, spec: TaskSpec, name: str, seed: int) -> TaskSource | None:
    """Return the stream of the entries, in order, except for entries claimed from other consumers.

    Raises:
        ImportError: if the client library is not installed.
        ValueError: if ``url`` is invalid or contains a password, or a login file is invalid.
        OSError: if a login file cannot be read.
    """
    with translate_import_errors("redis"):
        from streams.brokers.redis import RedisStream, connect
    refuse_secrets("url", settings.url, 'write redis://user@host and password_file = "..."')
    connect(settings.url, settings, settings.timeout_seconds).close()
    return RedisStream(settings, settings.consumer or name, name)
