"""Tasks from a NATS JetStream stream; the position in it is kept in the ledger, and nothing in the server.

A message's data is the task as ``wire.encode`` writes it, its header ``id`` the task's id; without one that is
"<stream>:<sequence>". The stream must keep messages until they are read (its retention is "limits", not "workqueue").
"""

from streams.brokers.login import refuse_secrets, translate_import_errors
from streams.brokers.settings import NatsSettings as Settings
from streams.spec import TaskSpec
from streams.types import TaskSource

__all__ = ["Settings", "create_source"]


def create_source(settings: Settings, spec: TaskSpec, name: str, seed: int) -> TaskSource | None:
    """Return the stream of the messages, in their order.

    Raises:
        ImportError: if the client library is not installed.
        ValueError: if a secret stands in ``servers``, or a file does not hold what it is for.
        OSError: if a file cannot be read.
    """
    with translate_import_errors("nats"):
        from streams.brokers.nats import NatsStream, read_login
    for server in settings.servers.split(","):
        refuse_secrets("servers", server, 'write user = "..." and password_file = "...", or token_file', users=False)
    read_login(settings)
    return NatsStream(settings, name)
