"""Tasks from a NATS JetStream stream; the position in it is kept in the ledger, and nothing in the server.

A message's data is the task as ``wire.encode`` writes it, its header ``id`` the task's id; without one that is
"<stream>:<sequence>". The stream must keep messages until they are read (its retention is "limits", not "workqueue").
"""

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge, Le, MinLen

from streams.arrivals import TaskSource
from streams.extras import naming_extra
from streams.spec import TaskSpec


@dataclass(frozen=True)
class Settings:
    """Options of ``[[source]] kind = "nats"``.

    Attributes:
        servers: an address, nats:// or tls://, or several between commas.
        stream: the name of the stream.
        subject: which of its subjects are read, * and > allowed; left out: all.
        credentials_file: the user's credentials.
        batch: how many messages are asked for at once, at most.
        timeout_seconds: how long the server may take to answer before the connection is given up.
    """

    servers: Annotated[str, MinLen(1)] = "nats://127.0.0.1:4222"
    stream: Annotated[str, MinLen(1)] = "tasks"
    subject: Annotated[str, MinLen(1)] | None = None
    credentials_file: str | None = None
    batch: Annotated[int, Ge(1), Le(10_000)] = 256
    timeout_seconds: Annotated[float, Ge(1)] = 10.0


def open(settings: Settings, spec: TaskSpec, name: str, seed: int) -> TaskSource | None:
    """Return the stream of the messages, in their order; raises ``ImportError`` without the client library."""
    with naming_extra("nats"):
        from streams.sources._nats_stream import NatsStream
    return NatsStream(settings, name)
