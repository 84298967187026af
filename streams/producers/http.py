"""Send tasks to a running daemon over HTTP, with retries."""

import time
from typing import NoReturn

import httpx

from streams.client.protocol import RETRY_STATUSES, make_headers, parse_retry_after, read_error
from streams.formats.safetensors_header import is_json
from streams.producers.errors import RETRY_SECONDS, UNREACHABLE, RetryLater, SubmitError, retry
from streams.types import Receipt


def connect(url: str, token: str | None = None) -> httpx.Client:
    """Create a client that keeps its connections open for many calls of ``submit``; the caller must close it.

    Args:
        url: the address of the daemon, such as "http://127.0.0.1:8780".
        token: the bearer token to send with each request.

    Raises:
        ValueError: if this is not an address, or if it has a user, which the library would send instead of the token, a
            query or a fragment.
    """
    headers = make_headers(url, token)
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
    """Submit one task to a daemon and return its receipt once it is durable.

    The call is idempotent: the same id and body always give one round. It is repeated, with random exponential backoff
    and after the seconds that the daemon asks for, if the connection fails, the backlog is full (429), or the daemon is
    starting (503), fails (500, 502, 504) or has a full disk (507).

    Args:
        url: the address of the daemon.
        id: the id of the task, see ``wire.check_id``.
        body: the task as ``wire.encode`` returns it, or in JSON.
        token: the bearer token, if the daemon requires one.
        client: a client from ``connect``, for many tasks; without one, a connection is opened for this task.
        retry_seconds: seconds after which no further attempt begins.

    Raises:
        SubmitError: with the daemon's answer, if it rejects the task or no attempt succeeds in time.
    """
    if client is None:
        with connect(url, token) as new_client:
            return submit(url, id, body, token, new_client, retry_seconds)
    address = f"{url.rstrip('/')}/v1/tasks"
    return retry(retry_seconds, lambda: _post(client, address, id, body, token))


def _post(client: httpx.Client, url: str, id: str, body: bytes, token: str | None) -> Receipt:
    media_type = "application/json" if is_json(body) else "application/octet-stream"
    headers = {"Idempotency-Key": id, "Content-Type": media_type}
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
            answer.status_code, "unexpected_answer", f"{url} is not an online-meta daemon: {answer.text[:200]}"
        ) from error


def _refuse(answer: httpx.Response) -> NoReturn:
    error = read_error(answer)
    if answer.status_code in RETRY_STATUSES:
        wait = _retry_after_seconds(answer.headers.get("Retry-After"))
        raise RetryLater(answer.status_code, error.reason, error.detail, wait)
    raise SubmitError(answer.status_code, error.reason, error.detail)


def _retry_after_seconds(header: str | None) -> float:
    return parse_retry_after(header, time.time())


class HttpProducer:
    """A ``Producer`` for a daemon's HTTP API that keeps its connections open."""

    def __init__(self, url: str, client: httpx.Client, retry_seconds: float) -> None:
        """Take a client that ``connect`` created for the same ``url``."""
        self._url, self._client, self._retry_seconds = url, client, retry_seconds

    def send(self, id: str, body: bytes) -> Receipt:
        """Submit a task and return its receipt once it is durable in the daemon's history; raises as ``submit``."""
        return submit(self._url, id, body, client=self._client, retry_seconds=self._retry_seconds)

    def close(self) -> None:
        """Close the connections."""
        self._client.close()
