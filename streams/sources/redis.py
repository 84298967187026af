"""Tasks from a Redis stream, read by a consumer group, acknowledged only when they are durable.

Each entry has a field ``body``, the task as ``wire.encode`` writes it, and may have a field ``id``; without one the
task's id is "<stream>:<entry id>". The committed position is an entry id: with it the source goes on even when the
group is gone, and what Redis gives again is known by its id.
"""

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge, Gt, Le, MinLen

from streams.arrivals import TaskSource
from streams.extras import naming_extra
from streams.sources._client import read_secret
from streams.spec import TaskSpec


@dataclass(frozen=True)
class Settings:
    """Options of ``[[source]] kind = "redis"``.

    Attributes:
        url: of the server and database, redis:// or rediss://.
        stream: the key of the stream.
        group: the consumer group; it is made when there is none. Give each run a group of its own: what is given to
            one consumer of a group is given to no other.
        consumer: by which name this daemon reads; left out: the source's.
        password_file: a file that holds the password, so that it does not stand in ``url``.
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
    password_file: str | None = None
    claim_seconds: Annotated[float, Gt(0)] = 60.0
    delete: bool = False
    batch: Annotated[int, Ge(1), Le(10_000)] = 256
    timeout_seconds: Annotated[float, Ge(1)] = 10.0


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
