"""Read tasks from a NATS JetStream stream; the ledger stores the position, and the server stores none.

The data of a message is the task as ``wire.encode`` writes it, and its header ``id`` is the task's id. Without the
header the id is "<stream>:<sequence>". The stream must keep messages until they are read: its retention must be
"limits", not "workqueue".
"""

from streams.brokers.login import refuse_secrets, translate_import_errors
from streams.brokers.settings import NatsSettings as Settings
from streams.spec import TaskSpec
from streams.types import TaskSource

__all__ = ["Settings", "create_source"]


def create_source(settings: Settings, spec: TaskSpec, name: str, seed: int) -> TaskSource | None:
    """Return the stream of the messages, in order.

    Raises:
        ImportError: if the client library is not installed.
        ValueError: if ``servers`` is invalid or contains a secret, or a login file is invalid.
        OSError: if a login file cannot be read.
    """
    with translate_import_errors("nats"):
        from streams.brokers.nats import NatsStream, check_servers, read_login
    for server in settings.servers.split(","):
        refuse_secrets("servers", server, 'write user = "..." and password_file = "...", or token_file', users=False)
    check_servers(settings.servers, settings)
    read_login(settings)
    return NatsStream(settings, name)
