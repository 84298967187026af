"""What the commands that talk to a daemon share: the token, the connection, clear errors."""

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
    """Give a client of the daemon at ``url``; a daemon that cannot be reached becomes ``CommandError`` (75)."""
    if not is_address(url):
        raise ConfigError(f"--url {url!r} is no address: write it like http://127.0.0.1:8780")
    try:
        with connect(url, read_token(token_file, "--token-file")) as client:
            yield client
    except httpx.TransportError as error:
        raise CommandError(TRY_LATER, f"no daemon answers at {url}: {error}. {_advice(error)}") from error


def is_address(url: str) -> bool:
    """Whether ``url`` says how to reach a host: http or https, and a port that there can be."""
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # of the port
        return False


def _advice(error: httpx.TransportError) -> str:
    if "CERTIFICATE_VERIFY_FAILED" in str(error):
        return "Name the certificate of its authority in the environment variable SSL_CERT_FILE"
    return "Is `online-meta serve` running there?"


def expect_success(response: httpx.Response) -> httpx.Response:
    """Return the response; raises ``CommandError`` with what the daemon said when it refused."""
    if response.is_success:
        return response
    try:
        body = response.json()
        detail = f"{body['reason']}: {body['detail']}"
    except (ValueError, KeyError, TypeError):
        detail = response.text[:200]
    retryable = response.status_code in (429, 503, 507)
    hint = "; give it by --token-file" if response.status_code == codes.UNAUTHORIZED else ""
    raise CommandError(
        TRY_LATER if retryable else CONFIG, f"the daemon answered {response.status_code}: {detail}{hint}"
    )
