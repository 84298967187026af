"""How sources and producers connect to NATS."""

import asyncio

from nats.aio.client import Client


class Connection:
    """A connection to NATS, within one event loop, that ends when it is lost: who uses it then makes another."""

    def __init__(self) -> None:
        """Connect by ``open``."""
        self.client = Client()
        self._ended = asyncio.Event()

    async def open(self, servers: str, seconds: float, credentials: str | None = None) -> None:
        """Connect to an address, or to one of several between commas.

        Args:
            servers: nats:// or tls:// addresses.
            seconds: how long connecting may take, and about how long a server may say nothing.
            credentials: a file of user credentials.
        """

        async def stay_quiet(error: Exception) -> None:
            """Say nothing here: what fails is raised where it was asked for."""

        async def note_end() -> None:
            self._ended.set()

        try:
            await self.client.connect(
                servers.split(","),
                allow_reconnect=False,
                max_reconnect_attempts=1,  # to each server at first, too; there is no smaller number that is obeyed
                reconnect_time_wait=0,
                connect_timeout=max(1, round(seconds)),
                ping_interval=max(1, round(seconds / 2)),
                max_outstanding_pings=1,  # so that a connection which only seems to be there is noticed
                error_cb=stay_quiet,
                closed_cb=note_end,
                user_credentials=credentials,
            )
        except BaseException:
            await self.client.close()
            raise

    async def close(self) -> None:
        """Close it and wait for its end: one that was lost may still be closing itself."""
        await self.client.close()
        await self._ended.wait()
