"""The HTTP client of the commands that talk to a daemon: token, connection, error messages."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import httpx
from httpx import codes

from deploy.config.config import read_token
from deploy.exits import CONFIG, TRY_LATER, CommandError, ConfigError
from streams.producers import connect


@contextmanager
def daemon_client(url: str, token_file: Path | None) -> Iterator[httpx.Client]:
    """Yield an HTTP client for the daemon at ``url``.

    Args:
        url: address of the daemon, for example ``http://127.0.0.1:8780``.
        token_file: file that contains the daemon's token; None sends no token.

    Raises:
        ConfigError: if ``url`` is not an address or the token file cannot be read.
        CommandError: with exit code 75 if the daemon cannot be reached.
    """
    if not is_address(url):
        raise ConfigError(f"--url {url!r} is not an address: write it like http://127.0.0.1:8780")
    try:
        client = connect(url, read_token(token_file, "--token-file"))
    except ValueError as error:
        raise ConfigError(f"--url {error}") from error
    try:
        with client:
            yield client
    except httpx.TransportError as error:
        raise CommandError(TRY_LATER, f"no daemon answers at {url}: {error}. {_advice(error)}") from error


def is_address(url: str) -> bool:
    """Return whether ``url`` is an http or https address of a host, with a valid port if it has one."""
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # the port is not a number in 0..65535
        return False


def _advice(error: httpx.TransportError) -> str:
    if "CERTIFICATE_VERIFY_FAILED" in str(error):
        return "Set the environment variable SSL_CERT_FILE to the certificate of its certificate authority"
    return "Is `online-meta serve` running there?"


def expect_success(response: httpx.Response) -> httpx.Response:
    """Return a successful response unchanged.

    Raises:
        CommandError: for any other response, with the daemon's reason and detail; exit code 75 if a retry can help,
            otherwise 78.
    """
    if response.is_success:
        return response
    try:
        body = response.json()
        detail = f"{body['reason']}: {body['detail']}"
    except (ValueError, KeyError, TypeError):
        detail = response.text[:200]
    retryable = response.status_code in (429, 503, 507)
    hint = "; pass it with --token-file" if response.status_code == codes.UNAUTHORIZED else ""
    raise CommandError(
        TRY_LATER if retryable else CONFIG, f"the daemon answered {response.status_code}: {detail}{hint}"
    )
