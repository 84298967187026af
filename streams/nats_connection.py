"""How sources and producers connect to NATS."""

import asyncio
from contextlib import suppress
from typing import Any

import nats.errors
from nats.aio.client import Client

from streams.login import LoginRefused, NatsLogin, hide_secrets, make_tls_context, read_secret, translate_login_errors

CLOSE_SECONDS = 1.0
"""How long a connection whose TLS handshake failed may take to close: the client library would wait for ever."""


class _TlsOnlyClient(Client):
    """A client that says who it is over TLS only; the library itself goes on without it where a server offers none."""

    def _connect_command(self) -> bytes:
        if not self._server_info.get("tls_required"):
            raise LoginRefused("TLS is asked for, and the server does not require it: nothing was told to it")
        return super()._connect_command()


class Connection:
    """A connection to NATS, within one event loop, that ends when it is lost: who uses it then makes another."""

    def __init__(self) -> None:
        """Connect by ``open``."""
        self.client: Client = Client()
        self._closed = asyncio.Event()

    async def open(self, servers: str, seconds: float, login: NatsLogin) -> None:
        """Connect to an address, or to one of several between commas.

        Args:
            servers: nats:// or tls:// addresses.
            seconds: how long connecting may take, and about how long a server may say nothing.
            login: the files are read now.

        Raises:
            LoginRefused: when the server does not let us in, or its certificate is not believed.
            ValueError: if a file does not hold what it is for.
            OSError: if a file cannot be read, or no server can be reached.
            nats.errors.Error: if something else goes wrong.
        """
        options = read_login(login)
        if "tls" in options or "tls://" in servers:
            self.client = _TlsOnlyClient()

        async def ignore_error(error: Exception) -> None:
            """Say nothing here: what fails is raised where it was asked for."""

        async def mark_closed() -> None:
            self._closed.set()

        try:
            with translate_login_errors(hide_secrets(servers), nats.errors.AuthorizationError):
                await self._connect(
                    servers=servers.split(","),
                    allow_reconnect=False,
                    max_reconnect_attempts=1,  # to each server at first, too; there is no smaller number that is obeyed
                    reconnect_time_wait=0,
                    connect_timeout=max(1, round(seconds)),
                    ping_interval=max(1, round(seconds / 2)),
                    max_outstanding_pings=1,  # so that a connection which only seems to be there is noticed
                    error_cb=ignore_error,
                    closed_cb=mark_closed,
                    **options,
                )
        except BaseException:
            with suppress(TimeoutError):
                await asyncio.wait_for(self.client.close(), CLOSE_SECONDS)
            raise

    async def _connect(self, **options: Any) -> None:
        """Connect; raises ``nats.errors.AuthorizationError`` for what the library calls just an error."""
        try:
            await self.client.connect(**options)
        except nats.errors.Error as error:
            if "authorization" in str(error).lower() or "authentication" in str(error).lower():
                raise nats.errors.AuthorizationError(str(error)) from error
            raise

    async def close(self) -> None:
        """Close it and wait for its end: one that was lost may still be closing itself."""
        await self.client.close()
        await self._closed.wait()


def read_login(login: NatsLogin) -> dict[str, Any]:
    """Return the client's options for a login.

    Raises:
        OSError: if a file cannot be read.
        ValueError: if one does not hold what it is for, or a password lacks its user.
    """
    if (login.user is None) != (login.password_file is None):
        raise ValueError("user and password_file belong together: one of them is missing")
    context = make_tls_context(login)
    options: dict[str, Any] = {} if context is None else {"tls": context}
    if login.user is not None and login.password_file is not None:
        options |= {"user": login.user, "password": read_secret(login.password_file)}
    if login.token_file is not None:
        options["token"] = read_secret(login.token_file)
    if login.credentials_file is not None:
        with open(login.credentials_file, "rb"):  # what the library raises does not name the file
            options["user_credentials"] = login.credentials_file
    return options
