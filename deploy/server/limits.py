"""Limit HTTP requests: bytes and time of headers and bodies, number of connections, memory of all bodies together."""

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
"""Allowance for open files, pipes and sockets other than clients' connections."""


def make_bounded_protocol(limits: Limits) -> Callable[..., asyncio.Protocol]:
    """Return the factory of ``BoundedProtocol`` that uvicorn calls for each connection."""
    return partial(BoundedProtocol, limits)


class BoundedProtocol(HttpToolsProtocol):
    """The HTTP protocol of one connection, with limits on the time and size of request headers.

    uvicorn waits without limit for the end of a request's headers, and httptools stores headers of any size. This class
    uses one timer per connection, not per request, so that a request costs no extra time.

    Args:
        limits: ``connections``, ``header_bytes`` and ``header_seconds`` are used.
        arguments: passed on to uvicorn's protocol.
    """

    def __init__(self, limits: Limits, **arguments: Any) -> None:
        """Start without a request."""
        super().__init__(**arguments)
        self._limits = limits
        self._waiting_since = 0.0
        self._request_begun = False  # whether the first byte of the next request has arrived
        self._bytes_since_body = 0  # bytes received since the last byte of a body
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Accept a connection and start its timer; answer 503 and close it if too many are open."""
        super().connection_made(transport)
        self._waiting_since = self.loop.time()
        if len(self.connections) > self._limits.connections:
            detail = f"{self._limits.connections} connections are open, which is the limit; try again later"
            self._refuse(503, "too_many_connections", detail, "Retry-After: 1\r\n")
        else:
            self._timer = self.loop.call_later(self._limits.header_seconds, self._check_timeout)

    def connection_lost(self, exc: Exception | None) -> None:
        """Cancel the timer."""
        if self._timer is not None:
            self._timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Count bytes outside of bodies, which are headers and trailers; answer 431 past the limit."""
        self._bytes_since_body += len(data)
        super().data_received(data)
        if self._bytes_since_body > self._limits.header_bytes and not self.transport.is_closing():
            self._refuse(431, "headers_too_large", self._too_large())

    def on_message_begin(self) -> None:
        """Restart the time limit at the first byte of a request."""
        self._waiting_since, self._request_begun = self.loop.time(), True
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """Answer 431, without calling the application, if the headers arrived in one piece and are too large."""
        self._request_begun = False
        lines = len(self.headers) * len(b": \r\n")
        if len(self.url) + lines + sum(map(len, chain(*self.headers))) > self._limits.header_bytes:
            body = {"reason": "headers_too_large", "detail": self._too_large()}
            self.app = JSONResponse(body, 431, headers={"Connection": "close"})
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Reset the byte count; ``read_body`` limits the body."""
        self._bytes_since_body = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Reset the byte count for the next request."""
        self._bytes_since_body = 0
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """Restart the time limit; the rest of this request's body may still arrive."""
        self._waiting_since = self.loop.time()
        super().on_response_complete()

    def _check_timeout(self) -> None:
        """Close the connection if it has been idle for too long; otherwise schedule the next check."""
        cycle: RequestResponseCycle | None = self.cycle
        busy = cycle is not None and not cycle.response_complete
        keep_alive = self.timeout_keep_alive_task is not None
        seconds = float(self._limits.header_seconds)
        left = seconds if busy or keep_alive else self._waiting_since + seconds - self.loop.time()
        if left > 0:
            self._timer = self.loop.call_later(left, self._check_timeout)
        elif self._request_begun:
            self._refuse(
                408, "too_slow", f"the headers did not arrive within {self._limits.header_seconds} s; send them faster"
            )
        else:
            self.transport.close()

    def _too_large(self) -> str:
        return f"the headers have more than {self._limits.header_bytes} bytes, which is the limit"

    def _refuse(self, status: int, reason: str, detail: str, more: str = "") -> None:
        body = json.dumps({"reason": reason, "detail": detail})
        head = f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\nContent-Type: application/json\r\n"
        head += f"Content-Length: {len(body)}\r\nConnection: close\r\n{more}\r\n"
        self.transport.write((head + body).encode())
        self.transport.close()


def allow_descriptors(limits: Limits) -> None:
    """Raise this process's limit of open files to what ``limits.connections`` may need.

    Raises:
        ConfigError: if the system does not allow that number.
    """
    needed = limits.connections + OTHER_DESCRIPTORS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise ConfigError(
            f"[serve.limits] connections = {limits.connections} needs {needed} open files, but the limit of this "
            f"process is {hard}: raise it (`ulimit -n`, LimitNOFILE of systemd), or set connections to at most "
            f"{hard - OTHER_DESCRIPTORS}"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


BUDGET_BYTES = 64 * 1024 * 1024
"""Memory for the bodies of all requests in progress; at least that of four bodies of the maximum size."""


MAX_CONCURRENT_UNPACKS = 2


class TooSlow(Exception):
    """The body of a request did not arrive in time."""


class BudgetExhausted(Exception):
    """The bodies of other requests use all the memory that is reserved for bodies."""


class BodyBudget:
    """A budget of memory, in bytes, that the bodies of all requests share; use it from the event loop only.

    Args:
        limits: of one body.
    """

    def __init__(self, limits: Limits) -> None:
        """Start with the whole budget free."""
        self.limits = limits
        self.unpacking = CapacityLimiter(MAX_CONCURRENT_UNPACKS)
        self._free_bytes = max(BUDGET_BYTES, 4 * limits.body_bytes)

    @contextmanager
    def reserve(self) -> Iterator["Reservation"]:
        """Yield the reservation of one request; free it at the end of the block."""
        reservation = Reservation(self)
        try:
            yield reservation
        finally:
            self.take(-reservation.reserved_bytes)

    def take(self, count: int) -> None:
        """Reserve ``count`` bytes, or free them if negative; raises ``BudgetExhausted`` if too few are free."""
        if count > self._free_bytes:
            raise BudgetExhausted(
                "the bodies of other requests use all the memory reserved for bodies; try again later"
            )
        self._free_bytes -= count


class Reservation:
    """The part of the budget that one request uses, and the state of its body.

    ``received`` is the part of the body that has arrived; ``complete`` says whether all of it has.
    """

    def __init__(self, body_budget: BodyBudget) -> None:
        """Start with no bytes reserved."""
        self.body_budget = body_budget
        self.reserved_bytes = 0
        self.received = bytearray()
        self.complete = False

    def take(self, count: int) -> None:
        """Reserve ``count`` more bytes; raises ``BudgetExhausted`` if too few are free."""
        self.body_budget.take(count)
        self.reserved_bytes += count


async def read_body(request: Request, reservation: Reservation) -> bytes:
    """Read the body of a request and decompress it if it has a Content-Encoding.

    Args:
        request: whose body has not been read.
        reservation: of the request; ``received`` is set to the body as it arrived.

    Raises:
        Rejected: "too_large" for more than ``limits.body_bytes``, after which no more is read; also the reasons of
            ``decompress``.
        TooSlow: if the body takes longer than ``limits.body_seconds``.
        BudgetExhausted: if no memory is left for it.
    """
    limits = reservation.body_budget.limits
    try:
        async with asyncio.timeout(limits.body_seconds):
            await _receive(request, reservation)
    except TimeoutError as error:
        progress = f"{len(reservation.received)} bytes of the body arrived within {limits.body_seconds} s"
        raise TooSlow(f"{progress}, which is the time limit for a body; send smaller bodies") from error
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
        raise Rejected("too_large", f"the body has {declared} bytes; the limit is {limit} bytes")
    async for chunk in request.stream():
        reservation.take(len(chunk))
        reservation.received += chunk
        if len(reservation.received) > limit:
            raise Rejected("too_large", f"the body has more than {limit} bytes, which is the limit")
