"""Tasks from a Redis stream, read by a consumer group, acknowledged only when they are durable.

Each entry has a field ``body``, the task as ``wire.encode`` writes it, and may have a field ``id``; without one the
task's id is "<stream>:<entry id>". The committed position is an entry id: with it the source goes on even when the
group is gone, and what Redis gives again is known by its id.
"""

from streams.brokers.login import refuse_secrets, translate_import_errors
from streams.brokers.settings import RedisSettings as Settings
from streams.spec import TaskSpec
from streams.types import TaskSource

__all__ = ["Settings", "create_source"]


def create_source(settings: Settings, spec: TaskSpec, name: str, seed: int) -> TaskSource | None:
    """Return the stream of the entries, in their order; those taken over from other consumers come when they come.

    Raises:
        ImportError: if the client library is not installed.
        ValueError: if ``url`` is none or holds a password, or a file does not hold what it is for.
        OSError: if a file cannot be read.
    """
    with translate_import_errors("redis"):
        from streams.brokers.redis import RedisStream, connect
    refuse_secrets("url", settings.url, 'write redis://user@host and password_file = "..."')
    connect(settings.url, settings, settings.timeout_seconds).close()
    return RedisStream(settings, settings.consumer or name, name)
