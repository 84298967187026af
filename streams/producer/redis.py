"""Bring tasks to a Redis stream."""

from typing import Any
from urllib.parse import SplitResult, parse_qsl, urlencode

import redis

from streams.login import Login, LoginRefused, naming_refusal, take_login
from streams.producer.errors import UNREACHABLE, SubmitError, TryLater, check_name, try_again
from streams.redis_connection import REFUSALS, connect, place_of

TIMEOUT_SECONDS = 10.0


class RedisProducer:
    """A ``Producer`` of entries with the fields ``id`` and ``body``.

    XADD is answered once the entry is in the append-only file if the server runs with ``appendfsync always``.
    """

    def __init__(self, url: SplitResult, patience: float) -> None:
        """Write to the stream that the address names in ``?stream=``; raises ``ValueError`` if it names none."""
        login, asked = take_login(Login, dict(parse_qsl(url.query)))
        self._stream = asked.pop("stream", "")
        self._where = place_of(url.geturl())
        if not self._stream:
            raise ValueError(f"{url.hostname}:{url.port or 6379}: which stream? End the address with ?stream=tasks")
        self._patience = patience
        self._client: Any = connect(url._replace(query=urlencode(asked)).geturl(), login, TIMEOUT_SECONDS)

    def send(self, id: str, body: bytes) -> None:
        """Add an entry; one whose answer was lost is added again."""
        check_name(id)
        try_again(self._patience, lambda: self._add(id, body))

    def _add(self, id: str, body: bytes) -> None:
        try:
            with naming_refusal(self._where, *REFUSALS):
                self._client.xadd(self._stream, {"id": id, "body": body})
        except LoginRefused as error:
            raise SubmitError(None, "refused", str(error)) from error
        except (redis.ConnectionError, redis.TimeoutError) as error:
            raise TryLater(None, UNREACHABLE, f"{self._where}: {error}") from error
        except redis.RedisError as error:
            raise SubmitError(None, "refused", f"{self._where}, stream {self._stream}: {error}") from error

    def close(self) -> None:
        """Close the connection."""
        self._client.close()
