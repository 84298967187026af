"""Reading the bodies of requests with bounds on bytes, on time, and on what all of them hold together."""

import asyncio
import json
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http import HTTPStatus
from itertools import chain
from typing import Any

from anyio import CapacityLimiter, to_thread
from fastapi import Request
from fastapi.responses import JSONResponse
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from deploy.exits import ConfigError
from streams.formats.compression import decompress
from streams.spec import Limits
from streams.types import Rejected

OTHER_DESCRIPTORS = 200
"""How many files, pipes and sockets the daemon has open beside its clients' connections."""


def make_bounded_protocol(limits: Limits) -> Callable[..., asyncio.Protocol]:
    """Return what makes uvicorn's protocol for each connection, with bounds on it."""
    return partial(BoundedProtocol, limits)


class BoundedProtocol(HttpToolsProtocol):
    """HTTP of one connection, which is closed when it holds a place in vain.

    uvicorn waits for ever for the end of a request's headers, and httptools keeps whatever comes of them. Here one
    timer a connection, and not one a request, looks whether it waits for too long, so that a request costs no more.

    Args:
        limits: ``connections``, ``header_bytes`` and ``header_seconds`` of it.
        arguments: as uvicorn gives it.
    """

    def __init__(self, limits: Limits, **arguments: Any) -> None:
        """Nothing has come yet."""
        super().__init__(**arguments)
        self._limits = limits
        self._waiting_since = 0.0
        self._request_begun = False  # the next request, by its first byte
        self._bytes_since_body = 0  # bytes since the last that were of a body
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take a connection, or let it go where there are too many."""
        super().connection_made(transport)
        self._waiting_since = self.loop.time()
        if len(self.connections) > self._limits.connections:
            detail = f"{self._limits.connections} connections are open, the most that are taken; try again in a moment"
            self._refuse(503, "too_many_connections", detail, "Retry-After: 1\r\n")
        else:
            self._timer = self.loop.call_later(self._limits.header_seconds, self._check_timeout)

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the timer, too."""
        if self._timer is not None:
            self._timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Count what is no body: headers, and what may follow a body in pieces."""
        self._bytes_since_body += len(data)
        super().data_received(data)
        if self._bytes_since_body > self._limits.header_bytes and not self.transport.is_closing():
            self._refuse(431, "headers_too_large", self._too_large())

    def on_message_begin(self) -> None:
        """Give a request its time from its first byte."""
        self._waiting_since, self._request_begun = self.loop.time(), True
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """Answer a request whose headers came at once, and are too large, without asking the application."""
        self._request_begun = False
        lines = len(self.headers) * len(b": \r\n")
        if len(self.url) + lines + sum(map(len, chain(*self.headers))) > self._limits.header_bytes:
            body = {"reason": "headers_too_large", "detail": self._too_large()}
            self.app = JSONResponse(body, 431, headers={"Connection": "close"})
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """A body has bounds of its own."""
        self._bytes_since_body = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Begin to count anew for the next request."""
        self._bytes_since_body = 0
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """Wait for the next request, the body of this one may still be coming."""
        self._waiting_since = self.loop.time()
        super().on_response_complete()

    def _check_timeout(self) -> None:
        """Close the connection if it has waited for too long, or look again when it may have."""
        cycle: RequestResponseCycle | None = self.cycle
        busy = cycle is not None and not cycle.response_complete
        keep_alive = self.timeout_keep_alive_task is not None
        seconds = float(self._limits.header_seconds)
        left = seconds if busy or keep_alive else self._waiting_since + seconds - self.loop.time()
        if left > 0:
            self._timer = self.loop.call_later(left, self._check_timeout)
        elif self._request_begun:
            self._refuse(
                408, "too_slow", f"the headers did not come in {self._limits.header_seconds} s; send them faster"
            )
        else:
            self.transport.close()

    def _too_large(self) -> str:
        return f"the headers have more than {self._limits.header_bytes} bytes, the most that are taken"

    def _refuse(self, status: int, reason: str, detail: str, more: str = "") -> None:
        body = json.dumps({"reason": reason, "detail": detail})
        head = f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\nContent-Type: application/json\r\n"
        head += f"Content-Length: {len(body)}\r\nConnection: close\r\n{more}\r\n"
        self.transport.write((head + body).encode())
        self.transport.close()


def allow_descriptors(limits: Limits) -> None:
    """Let this process have as many open files as ``limits.connections`` may need.

    Raises:
        ConfigError: if the system does not allow so many.
    """
    needed = limits.connections + OTHER_DESCRIPTORS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise ConfigError(
            f"[serve.limits] connections = {limits.connections} needs {needed} open files, and this process may have "
            f"{hard}: raise that (`ulimit -n`, LimitNOFILE of systemd), or take at most {hard - OTHER_DESCRIPTORS}"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


BUDGET_BYTES = 64 * 1024 * 1024
"""How many bytes the bodies of all requests under way hold together, or four of the largest."""


MAX_CONCURRENT_UNPACKS = 2


class TooSlow(Exception):
    """A body that did not come in time."""


class BudgetExhausted(Exception):
    """The bodies of other requests take all the memory there is for them."""


class BodyBudget:
    """Memory for bodies, as bytes counted; used from the event loop alone.

    Args:
        limits: of one body.
    """

    def __init__(self, limits: Limits) -> None:
        """All of it is free."""
        self.limits = limits
        self.unpacking = CapacityLimiter(MAX_CONCURRENT_UNPACKS)
        self._free_bytes = max(BUDGET_BYTES, 4 * limits.body_bytes)

    @contextmanager
    def reserve(self) -> Iterator["Reservation"]:
        """Give a part to one request, which is free again at the end of the block."""
        reservation = Reservation(self)
        try:
            yield reservation
        finally:
            self.take(-reservation.reserved_bytes)

    def take(self, count: int) -> None:
        """Take so many bytes, or give them back; raises ``BudgetExhausted`` when they are not there."""
        if count > self._free_bytes:
            raise BudgetExhausted(
                "the bodies of other requests fill the memory there is for them; try again in a moment"
            )
        self._free_bytes -= count


class Reservation:
    """The bytes that one request has reserved, what was ``received`` of its body, and whether it is ``complete``."""

    def __init__(self, body_budget: BodyBudget) -> None:
        """Begin with nothing."""
        self.body_budget = body_budget
        self.reserved_bytes = 0
        self.received = bytearray()
        self.complete = False

    def take(self, count: int) -> None:
        """Take more; raises ``BudgetExhausted``."""
        self.body_budget.take(count)
        self.reserved_bytes += count


async def read_body(request: Request, reservation: Reservation) -> bytes:
    """Return the body of a request, unpacked if it came compressed; ``reservation.received`` is what was received.

    Raises:
        Rejected: "too_large" past ``limits.body_bytes``, further than which nothing is read; and as ``decompress``.
        TooSlow: if it takes longer than ``limits.body_seconds``.
        Crowded: if there is no memory left for it.
    """
    limits = reservation.body_budget.limits
    try:
        async with asyncio.timeout(limits.body_seconds):
            await _receive(request, reservation)
    except TimeoutError as error:
        progress = f"{len(reservation.received)} bytes of the body came in {limits.body_seconds} s"
        raise TooSlow(f"{progress}, the longest that a body may take; send less at once") from error
    reservation.complete = True
    encoding = ", ".join(request.headers.getlist("content-encoding"))
    received = bytes(reservation.received)
    if not encoding:
        return received
    body = await to_thread.run_sync(decompress, received, encoding, limits, limiter=reservation.body_budget.unpacking)
    reservation.take(len(body))
    return body


async def _receive(request: Request, reservation: Reservation) -> None:
    limit = reservation.body_budget.limits.body_bytes
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > limit:
        raise Rejected("too_large", f"the body has {declared} bytes; at most {limit} are taken")
    async for chunk in request.stream():
        reservation.take(len(chunk))
        reservation.received += chunk
        if len(reservation.received) > limit:
            raise Rejected("too_large", f"the body has more than {limit} bytes, the most that are taken")
