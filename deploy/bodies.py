"""Reading the bodies of requests with bounds on bytes, on time, and on what all of them hold together."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from anyio import CapacityLimiter, to_thread
from fastapi import Request

from streams.arrivals import Rejected
from streams.compressed import decompress
from streams.spec import Limits

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
    """The bytes that one request has reserved; its body as far as it was ``received``, and whether it is ``complete``."""

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
