"""How sources and producers connect to NATS."""

import nats
from nats.aio.client import Client


async def connect(servers: str, seconds: float, credentials: str | None = None) -> Client:
    """Return a connection that ends when it is lost, for who uses it connects anew from the position it knows.

    Args:
        servers: an address, or several between commas.
        seconds: how long connecting may take.
        credentials: a file of user credentials.
    """

    async def stay_quiet(error: Exception) -> None:
        """Say nothing here: what fails is raised where it was asked for."""

    return await nats.connect(
        servers.split(","),
        allow_reconnect=False,
        connect_timeout=max(1, round(seconds)),
        ping_interval=max(1, round(seconds / 2)),
        max_outstanding_pings=1,  # so that a connection which only seems to be there is noticed
        error_cb=stay_quiet,
        user_credentials=credentials,
    )
