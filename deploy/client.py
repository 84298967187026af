"""What the commands that talk to a daemon share: the token, the connection, clear errors."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from deploy.exits import CONFIG, TRY_LATER, ConfigError, Stop
from deploy.token import read_token
from streams.producer import connect


@contextmanager
def daemon_client(url: str, token_file: Path | None) -> Iterator[httpx.Client]:
    """Give a client of the daemon at ``url``; a daemon that cannot be reached becomes ``Stop`` (75)."""
    try:
        with connect(url, read_token(token_file, "--token-file")) as client:
            yield client
    except httpx.InvalidURL as error:
        raise ConfigError(f"--url {url!r} is no address: write it like http://127.0.0.1:8780") from error
    except httpx.UnsupportedProtocol as error:
        raise ConfigError(f"--url {url!r} is no address: write it like http://127.0.0.1:8780") from error
    except httpx.TransportError as error:
        raise Stop(TRY_LATER, f"no daemon answers at {url}: {error}. Is `online-meta serve` running there?") from error


def expect_success(response: httpx.Response) -> httpx.Response:
    """Return the response; raises ``Stop`` with what the daemon said when it refused."""
    if response.is_success:
        return response
    try:
        told = response.json()
        detail = f"{told['reason']}: {told['detail']}"
    except (ValueError, KeyError, TypeError):
        detail = response.text[:200]
    again = response.status_code in (429, 503, 507)
    raise Stop(TRY_LATER if again else CONFIG, f"the daemon answered {response.status_code}: {detail}")
