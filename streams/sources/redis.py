"""Tasks from a Redis stream, read by a consumer group, acknowledged only when they are durable.

Each entry has a field ``body``, the task as ``wire.encode`` writes it, and may have a field ``id``; without one the
task's id is "<stream>:<entry id>". The committed position is an entry id: with it the source goes on even when the
group is gone, and what Redis gives again is known by its id.
"""

from streams.arrivals import TaskSource
from streams.extras import naming_extra
from streams.sources._broker_settings import RedisSettings as Settings
from streams.sources._client import read_secret
from streams.spec import TaskSpec

__all__ = ["Settings", "open"]


def open(settings: Settings, spec: TaskSpec, name: str, seed: int) -> TaskSource | None:
    """Return the stream of the entries, in their order; those taken over from other consumers come when they come.

    Raises:
        ImportError: if the client library is not installed.
        ValueError: if ``url`` is none.
        OSError: if ``password_file`` cannot be read.
    """
    with naming_extra("redis"):
        from streams.sources._redis_stream import RedisStream, check_url
    check_url(settings.url)
    password = None if settings.password_file is None else read_secret(settings.password_file)
    return RedisStream(settings, settings.consumer or name, password, name)
