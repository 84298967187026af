"""Send tasks to a Redis stream."""

from typing import Any
from urllib.parse import SplitResult, urlencode

import redis

from streams.brokers.login import Login, LoginRefused, split_login, translate_login_errors
from streams.brokers.redis import AUTH_ERRORS, connect, redact_url
from streams.producers.errors import UNREACHABLE, RetryLater, SubmitError, check_task_id, retry

TIMEOUT_SECONDS = 10.0


class RedisProducer:
    """A ``Producer`` of entries with the fields ``id`` and ``body``.

    The server answers once the entry is in its append-only file, if it runs with ``appendfsync always``.
    """

    def __init__(self, url: SplitResult, retry_seconds: float) -> None:
        """Take an address that names the stream in ``?stream=``; raise ``ValueError`` if it names none."""
        login, others = split_login(Login, url.query, "stream", "db")
        self._stream = others.pop("stream", "")
        self._where = redact_url(url.geturl())
        if not self._stream:
            raise ValueError(f"{url.hostname}:{url.port or 6379}: which stream? End the address with ?stream=tasks")
        self._retry_seconds = retry_seconds
        self._client: Any = connect(url._replace(query=urlencode(others)).geturl(), login, TIMEOUT_SECONDS)

    def send(self, id: str, body: bytes) -> None:
        """Add an entry; add it again if the answer is lost."""
        check_task_id(id)
        retry(self._retry_seconds, lambda: self._add(id, body))

    def _add(self, id: str, body: bytes) -> None:
        try:
            with translate_login_errors(self._where, *AUTH_ERRORS):
                self._client.xadd(self._stream, {"id": id, "body": body})
        except LoginRefused as error:
            raise SubmitError(None, "refused", str(error)) from error
        except (redis.ConnectionError, redis.TimeoutError) as error:
            raise RetryLater(None, UNREACHABLE, f"{self._where}: {error}") from error
        except redis.RedisError as error:
            raise SubmitError(None, "refused", f"{self._where}, stream {self._stream}: {error}") from error

    def close(self) -> None:
        """Close the connection."""
        self._client.close()
