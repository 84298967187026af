"""Open the daemon's listening socket, and check that it is safe to expose."""

import errno
import socket
import ssl
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import uvicorn

from deploy.config.config import ServeSettings, read_token, split_probes
from deploy.exits import TRY_LATER, CommandError, ConfigError
from deploy.server.limits import make_bounded_protocol
from deploy.server.origins import AllowedHosts, is_loopback
from streams.private_files import SecretExposed, check_private
from streams.spec import Limits

MAX_PROBES = 64
"""Connections to the listener of the probes."""


def check_exposure(settings: ServeSettings) -> str | None:
    """Return the token that requests must carry, or None if no token is configured.

    Raises:
        ConfigError: if a host that other machines can reach has no TLS or no token, if the files of either cannot be
            used, or if ``hosts`` contains anything but host names.
    """
    AllowedHosts(settings)
    file = settings.token_file
    token = read_token(None if file is None else Path(file), "[serve] token_file")
    if (settings.tls_cert is None) != (settings.tls_key is None):
        raise ConfigError("[serve] tls_cert and tls_key go together: set both or neither")
    if settings.tls_cert is not None and settings.tls_key is not None:
        _check_certificate(settings.tls_cert, settings.tls_key)
    if not is_loopback(settings.host) and not (settings.tls_cert and token):
        raise ConfigError(
            f"[serve] host = {settings.host!r} can be reached from other machines: set tls_cert, tls_key and "
            'token_file, or host = "127.0.0.1"'
        )
    return token


def _check_certificate(cert: str, key: str) -> None:
    for name, file in (("tls_cert", cert), ("tls_key", key)):
        try:
            Path(file).read_bytes()
        except OSError as error:
            raise ConfigError(f"[serve] {name} {file} cannot be read: {error.strerror}") from error
    try:
        check_private(key)
    except SecretExposed as error:
        raise ConfigError(f"[serve] tls_key {error}") from error
    try:
        # The password callback prevents OpenSSL from asking for a password on the terminal.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(cert, key, password=lambda: "")
    except (ssl.SSLError, ValueError) as error:
        raise ConfigError(
            f"[serve] tls_cert {cert} and tls_key {key} must be a PEM certificate and its key, without a password: "
            f"{error}"
        ) from error


def bind_probes(settings: ServeSettings) -> socket.socket | None:
    """Return the listening socket of ``[serve] probes``; None if there is none. Raises as ``bind`` does."""
    if settings.probes is None:
        return None
    host, port = split_probes(settings.probes)
    try:
        return bind(replace(settings, host=host, port=port))
    except CommandError as error:
        raise CommandError(error.code, f"[serve] probes = {settings.probes!r}: {error}") from error


class ProbeServer:
    """A second HTTP server in a thread of its own, with limits of its own.

    Args:
        listener: its socket; None serves nothing.
        limits: of a request; the number of connections is ``MAX_PROBES``.
    """

    def __init__(self, listener: socket.socket | None, limits: Limits) -> None:
        """Prepare; the socket accepts connections that wait until ``start``."""
        self._listener, self._limits = listener, replace(limits, connections=MAX_PROBES)
        self._server: uvicorn.Server | None = None
        self._thread: threading.Thread | None = None

    def start(self, app: Any) -> None:
        """Serve an ASGI application."""
        if self._listener is None:
            return
        protocol: Any = make_bounded_protocol(self._limits)
        settings = uvicorn.Config(
            app,
            log_config=None,
            log_level="warning",
            access_log=False,
            http=protocol,
            ws="none",
            lifespan="off",
            loop="asyncio",
        )
        self._server = uvicorn.Server(settings)
        arguments = {"sockets": [self._listener]}
        self._thread = threading.Thread(target=self._server.run, kwargs=arguments, name="probes", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop serving, and close the socket."""
        if self._server is not None and self._thread is not None:
            self._server.should_exit = True
            self._thread.join(timeout=5)
        if self._listener is not None:
            self._listener.close()


def bind(settings: ServeSettings) -> socket.socket:
    """Return a listening socket.

    Raises:
        CommandError: with exit code 75 if the port is in use.
        ConfigError: if the address does not belong to this machine or the user may not listen on the port.
    """
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    # With the protocol named, asyncio sets TCP_NODELAY; without it a response waits 40 ms for an ACK.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((settings.host, settings.port))
        listener.listen(1024)
    except OSError as error:
        listener.close()
        raise _explain(settings, error) from error
    return listener


def _explain(settings: ServeSettings, error: OSError) -> CommandError:
    if isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL:
        return ConfigError(f"[serve] host = {settings.host!r} is not an address of this machine: {error.strerror}")
    if error.errno == errno.EACCES:
        return ConfigError(
            f"[serve] port = {settings.port}: this user may not listen on it ({error.strerror}); choose one above 1023"
        )
    return CommandError(
        TRY_LATER,
        f"cannot listen on {settings.host}:{settings.port}: {error.strerror}. Is another daemon running? "
        "Choose a free port with --set serve.port=PORT",
    )
