"""Talk to a running daemon from any program: submit tasks, adapt, predict, and read the regret and the verdict.

>>> from streams.client import Client
>>> with Client("http://127.0.0.1:8780") as daemon:
...     daemon.submit({"support_x": [[0.3], [-0.5]], "support_y": [[0.6], [0.8]]}, id="task-1")
...     daemon.adapt({"support_x": [[0.3]], "support_y": [[0.6]], "query_x": [[0.1]]}).predictions

It needs httpx alone, neither PyTorch nor NumPy. ``AsyncClient`` has the same methods as coroutines.
"""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import httpx

from streams.client.protocol import (
    Adaptation,
    Call,
    DaemonError,
    Result,
    RoundStatus,
    Verdict,
    adapt_call,
    json_call,
    label_call,
    make_headers,
    predict_call,
    read_answer,
    submit_call,
    task_call,
    unreachable,
    verdict_call,
)
from streams.types import Receipt

__all__ = ["Adaptation", "AsyncClient", "Client", "DaemonError", "Receipt", "RoundStatus", "Verdict"]

RETRY_SECONDS = 300.0
"""Seconds after which no further attempt begins."""

TIMEOUT = httpx.Timeout(30.0, connect=5.0)

LONGEST_WAIT = 15.0


class _Attempts:
    """The attempts of one call: which failures are repeated, and after how long."""

    def __init__(self, retry_seconds: float) -> None:
        """Begin with the first attempt."""
        self._until, self._failures = time.monotonic() + retry_seconds, 0

    def wait_after(self, error: DaemonError | httpx.TransportError) -> float:
        """Return the seconds until the next attempt; raise ``DaemonError`` if there is none.

        A wait is what the daemon asks for and a random part of 0.25, 0.5, 1, ... s, up to 15 s.
        """
        failure = unreachable(error) if isinstance(error, httpx.TransportError) else error
        wait = failure.retry_after + random.uniform(0, min(0.25 * 2**self._failures, LONGEST_WAIT))
        self._failures += 1
        if not failure.may_be_repeated or time.monotonic() + wait > self._until:
            raise failure from error
        return wait


class Client:
    """A connection to a daemon; methods return once the daemon has answered.

    A call is repeated if the connection fails, the daemon is full (429), starts or drains (503), or fails (500, 502,
    504, 507). That is safe: a task that is sent again under the same id remains one round.

    Args:
        url: the address of the daemon, such as "http://127.0.0.1:8780".
        token: the daemon's token, if it requires one.
        retry_seconds: seconds after which no further attempt begins; 0 tries once.
        http: a client with settings of your own, such as certificates; its base URL and headers are left alone.
        sleep: waits between two attempts.

    Raises:
        ValueError: if ``url`` is not an address.
    """

    def __init__(
        self,
        url: str,
        token: str | None = None,
        retry_seconds: float = RETRY_SECONDS,
        http: httpx.Client | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """Prepare the connection; it is opened by the first call."""
        self._url, self._headers = url.rstrip("/"), make_headers(url, token)
        self._retry_seconds, self._sleep = retry_seconds, sleep
        self._http = httpx.Client(timeout=TIMEOUT) if http is None else http

    def submit(self, task: Mapping[str, Any], id: str | None = None, *, safetensors: bool = False) -> Receipt:
        """Submit a task and return its receipt once it is durable.

        Args:
            task: ``support_x`` and ``support_y``, and possibly ``query_x`` and ``query_y``, as nested lists, NumPy
                arrays or torch tensors. Named inputs are a mapping, or have names such as ``support_x.tokens``.
            id: the id of the task; the default is the SHA-256 of the body.
            safetensors: send arrays as safetensors, which is faster. Their dtypes must be those of the run, and the
                package safetensors is needed.

        Raises:
            DaemonError: if the daemon rejects the task, or no attempt succeeds in time.
            ValueError: if a value is not a finite number.
        """
        return self.call(submit_call(task, id, safetensors))

    def adapt(
        self,
        request: Mapping[str, Any],
        *,
        safetensors: bool = False,
        parts: Sequence[str] = (),
        levels: Sequence[float] = (),
        samples: int | None = None,
    ) -> Adaptation:
        """Adapt to ``support_x`` and ``support_y`` and return the predictions for ``query_x``; raises as ``submit``.

        Args:
            request: the tensors by name.
            safetensors: send binary tensors instead of JSON.
            parts: what to add to the answer's ``tensors``: "mean", "std", "probabilities" or "information".
            levels: probabilities between 0 and 1, whose "quantiles" (q, n, ...) are added.
            samples: the number of samples of what is believed of the task that the answer is made of, 1 to 100; by
                default that of the run. ``tensors`` has them as "component.0.outputs" (S, n, ...).
        """
        return self.call(adapt_call(request, safetensors, parts, levels, samples))

    def predict(self, entity: str, rows: Sequence[Mapping[str, Any]], *, keep: bool = False) -> dict[str, Any]:
        """Return what the daemon predicts for rows of an entity, from what it knows of the entity.

        Args:
            entity: the key of the entity.
            rows: rows such as {"x": [0.5]}, or by the columns of a source, such as {"price": 3.5, "colour": "red"}.
            keep: let the daemon keep the prediction until its labels are known; ``prediction`` is its id, for
                ``label``.
        """
        return self.call(predict_call(entity, rows, keep))

    def label(self, prediction: str, labels: Any) -> dict[str, Any]:
        """Send the labels of a kept prediction, one for each of its rows, which become a round.

        Returns:
            The ``task`` with its id and round, and the ``loss`` of the stored answer.

        Raises:
            DaemonError: with the status 404 if no such prediction is kept, and 409 if it has other labels already.
            ValueError: if ``prediction`` is not the id of a prediction.
        """
        return self.call(label_call(prediction, labels))

    def entity(self, entity: str, points: int = 1000) -> dict[str, Any]:
        """Return what the daemon knows of an entity, and its newest rounds."""
        return self.call(json_call("entities", entity, points=points))

    def task(self, id: str) -> RoundStatus:
        """Return what became of a task."""
        return self.call(task_call(id))

    def regret(self, first: int = 0, to: int | None = None, points: int = 1000) -> dict[str, Any]:
        """Return the losses and the regret of the rounds from ``first`` up to ``to``, in at most ``points`` buckets."""
        return self.call(json_call("regret", **{"from": first}, to=to, points=points))

    def status(self) -> dict[str, Any]:
        """Return the state of the run."""
        return self.call(json_call("status"))

    def verdict(self) -> Verdict:
        """Return whether meta-learning pays on this stream."""
        return self.call(verdict_call())

    def call(self, call: Call[Result]) -> Result:
        """Send a call, repeat it as long as that may help, and return its result."""
        attempts = _Attempts(self._retry_seconds)
        while True:
            try:
                return read_answer(call, self._http.request(**call.arguments(self._url, self._headers)))
            except (DaemonError, httpx.TransportError) as error:
                wait = attempts.wait_after(error)
            self._sleep(wait)

    def close(self) -> None:
        """Close the connection."""
        self._http.close()

    def __enter__(self) -> Self:
        """Return the client."""
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        """Close the connection."""
        self.close()


class AsyncClient:
    """A ``Client`` whose methods are coroutines; the arguments and the results are the same."""

    def __init__(
        self,
        url: str,
        token: str | None = None,
        retry_seconds: float = RETRY_SECONDS,
        http: httpx.AsyncClient | None = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        """Prepare the connection; it is opened by the first call."""
        self._url, self._headers = url.rstrip("/"), make_headers(url, token)
        self._retry_seconds, self._sleep = retry_seconds, sleep
        self._http = httpx.AsyncClient(timeout=TIMEOUT) if http is None else http

    async def submit(self, task: Mapping[str, Any], id: str | None = None, *, safetensors: bool = False) -> Receipt:
        """Submit a task and return its receipt once it is durable, as ``Client.submit``."""
        return await self.call(submit_call(task, id, safetensors))

    async def adapt(
        self,
        request: Mapping[str, Any],
        *,
        safetensors: bool = False,
        parts: Sequence[str] = (),
        levels: Sequence[float] = (),
        samples: int | None = None,
    ) -> Adaptation:
        """Adapt to a support set and return the predictions, as ``Client.adapt``."""
        return await self.call(adapt_call(request, safetensors, parts, levels, samples))

    async def predict(self, entity: str, rows: Sequence[Mapping[str, Any]], *, keep: bool = False) -> dict[str, Any]:
        """Return what the daemon predicts for rows of an entity, as ``Client.predict``."""
        return await self.call(predict_call(entity, rows, keep))

    async def label(self, prediction: str, labels: Any) -> dict[str, Any]:
        """Send the labels of a kept prediction, as ``Client.label``."""
        return await self.call(label_call(prediction, labels))

    async def entity(self, entity: str, points: int = 1000) -> dict[str, Any]:
        """Return what the daemon knows of an entity, and its newest rounds."""
        return await self.call(json_call("entities", entity, points=points))

    async def task(self, id: str) -> RoundStatus:
        """Return what became of a task."""
        return await self.call(task_call(id))

    async def regret(self, first: int = 0, to: int | None = None, points: int = 1000) -> dict[str, Any]:
        """Return the losses and the regret of a range of rounds, as ``Client.regret``."""
        return await self.call(json_call("regret", **{"from": first}, to=to, points=points))

    async def status(self) -> dict[str, Any]:
        """Return the state of the run."""
        return await self.call(json_call("status"))

    async def verdict(self) -> Verdict:
        """Return whether meta-learning pays on this stream."""
        return await self.call(verdict_call())

    async def call(self, call: Call[Result]) -> Result:
        """Send a call, repeat it as long as that may help, and return its result."""
        attempts = _Attempts(self._retry_seconds)
        while True:
            try:
                return read_answer(call, await self._http.request(**call.arguments(self._url, self._headers)))
            except (DaemonError, httpx.TransportError) as error:
                wait = attempts.wait_after(error)
            await self._sleep(wait)

    async def close(self) -> None:
        """Close the connection."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        """Return the client."""
        return self

    async def __aexit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        """Close the connection."""
        await self.close()
