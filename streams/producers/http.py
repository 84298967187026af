"""Bring tasks to a running daemon over HTTP, as often as it takes."""

import email.utils
import time
from typing import NoReturn

import httpx

from streams.producers.errors import RETRY_SECONDS, UNREACHABLE, RetryLater, SubmitError, retry
from streams.types import Receipt

RETRY_STATUSES = (408, 429, 500, 502, 503, 504, 507)
"""The HTTP statuses that say nothing about the task."""


def connect(url: str, token: str | None = None) -> httpx.Client:
    """Return a client that keeps its connections to ``url`` open, for many calls of ``submit``; close it.

    Args:
        url: of the daemon, such as "http://127.0.0.1:8780".
        token: sent as a bearer token with each request.
    """
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    timeout = httpx.Timeout(30.0, connect=5.0)  # a commit waits for the disk, so an answer may take a while
    return httpx.Client(base_url=url, headers=headers, timeout=timeout)


def submit(
    url: str,
    id: str,
    body: bytes,
    token: str | None = None,
    client: httpx.Client | None = None,
    retry_seconds: float = RETRY_SECONDS,
) -> Receipt:
    """Bring one task and return its receipt once it is durable.

    It may be called again with the same id and body at any time: the daemon keeps one round. A connection that
    fails, a full backlog (429), a daemon that is starting (503), fails (500, 502, 504) or has a full disk (507) is
    tried again, after the seconds it asks for and random, growing waits.

    Args:
        url: of the daemon.
        id: of the task, see ``wire.check_id``.
        body: as ``wire.encode`` gives it.
        token: the bearer token, if the daemon asks for one.
        client: as ``connect`` gives it, for many tasks; without one, a connection is made for this task.
        retry_seconds: seconds after which no further try is begun.

    Raises:
        SubmitError: with what the daemon said, if it refuses the task or patience ends.
    """
    if client is None:
        with connect(url, token) as new_client:
            return submit(url, id, body, token, new_client, retry_seconds)
    address = f"{url.rstrip('/')}/v1/tasks"
    return retry(retry_seconds, lambda: _post(client, address, id, body, token))


def _post(client: httpx.Client, url: str, id: str, body: bytes, token: str | None) -> Receipt:
    headers = {"Idempotency-Key": id, "Content-Type": "application/octet-stream"}
    if token is not None:
        headers["Authorization"] = f"Bearer {token}"
    try:
        answer = client.post(url, content=body, headers=headers)
    except (httpx.LocalProtocolError, httpx.UnsupportedProtocol, httpx.InvalidURL, UnicodeEncodeError) as error:
        raise SubmitError(None, "bad_request", f"the request for {id!r} to {url} cannot be sent: {error}") from error
    except httpx.TransportError as error:
        raise RetryLater(None, UNREACHABLE, f"{url}: {type(error).__name__}: {error}") from error
    if answer.status_code not in (200, 201):
        _refuse(answer)
    try:
        content = answer.json()
        return Receipt(str(content["id"]), int(content["round"]), duplicate=answer.status_code == 200)
    except (ValueError, KeyError, TypeError) as error:
        raise SubmitError(
            answer.status_code, "unexpected_answer", f"{url} is no online-meta: {answer.text[:200]}"
        ) from error


def _refuse(answer: httpx.Response) -> NoReturn:
    try:
        content = answer.json()
        reason, detail = str(content["reason"]), str(content["detail"])
    except (ValueError, KeyError, TypeError):
        reason, detail = "unexpected_answer", answer.text[:200] or answer.reason_phrase
    if answer.status_code in RETRY_STATUSES:
        raise RetryLater(answer.status_code, reason, detail, _retry_after_seconds(answer.headers.get("Retry-After")))
    raise SubmitError(answer.status_code, reason, detail)


def _retry_after_seconds(header: str | None) -> float:
    """Return what a Retry-After header asks for, given in seconds or as a date; 0 without one."""
    if header is None:
        return 0.0
    try:
        return max(0.0, float(header))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(header).timestamp() - time.time())
    except ValueError:
        return 0.0


class HttpProducer:
    """A ``Producer`` for a daemon's own API, over connections that are kept open."""

    def __init__(self, url: str, client: httpx.Client, retry_seconds: float) -> None:
        """Use a client as ``connect`` gives it for the same ``url``."""
        self._url, self._client, self._retry_seconds = url, client, retry_seconds

    def send(self, id: str, body: bytes) -> Receipt:
        """Return the receipt once the task is durable in the daemon's history; raises as ``submit``."""
        return submit(self._url, id, body, client=self._client, retry_seconds=self._retry_seconds)

    def close(self) -> None:
        """Close the connections."""
        self._client.close()
