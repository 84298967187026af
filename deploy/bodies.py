"""Reading the bodies of requests with bounds on bytes, on time, and on what all of them hold together."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from anyio import CapacityLimiter, to_thread
from fastapi import Request

from streams.arrivals import Rejected
from streams.compressed import decompress
from streams.spec import Limits

HELD_BYTES = 64 * 1024 * 1024
"""How many bytes the bodies of all requests under way hold together, or four of the largest."""

UNPACKED_AT_ONCE = 2


class TooSlow(Exception):
    """A body that did not come in time."""


class Crowded(Exception):
    """The bodies of other requests take all the memory there is for them."""


class Room:
    """Memory for bodies, as bytes counted; used from the event loop alone.

    Args:
        limits: of one body.
    """

    def __init__(self, limits: Limits) -> None:
        """All of it is free."""
        self.limits = limits
        self.unpacking = CapacityLimiter(UNPACKED_AT_ONCE)
        self._free = max(HELD_BYTES, 4 * limits.body_bytes)

    @contextmanager
    def hold(self) -> Iterator["Hold"]:
        """Give a part to one request, which is free again at the end of the block."""
        hold = Hold(self)
        try:
            yield hold
        finally:
            self.take(-hold.taken)

    def take(self, count: int) -> None:
        """Take so many bytes, or give them back; raises ``Crowded`` when they are not there."""
        if count > self._free:
            raise Crowded("the bodies of other requests fill the memory there is for them; try again in a moment")
        self._free -= count


class Hold:
    """The bytes that one request has reserved; its body as far as it was ``sent``, and whether it is ``complete``."""

    def __init__(self, room: Room) -> None:
        """Begin with nothing."""
        self.room = room
        self.taken = 0
        self.sent = bytearray()
        self.complete = False

    def take(self, count: int) -> None:
        """Take more; raises ``Crowded``."""
        self.room.take(count)
        self.taken += count


async def read_body(request: Request, hold: Hold) -> bytes:
    """Return the body of a request, unpacked if it came compressed; ``hold.sent`` is what was received.

    Raises:
        Rejected: "too_large" past ``limits.body_bytes``, further than which nothing is read; and as ``decompress``.
        TooSlow: if it takes longer than ``limits.body_seconds``.
        Crowded: if there is no memory left for it.
    """
    limits = hold.room.limits
    try:
        async with asyncio.timeout(limits.body_seconds):
            await _receive(request, hold)
    except TimeoutError as error:
        came = f"{len(hold.sent)} bytes of the body came in {limits.body_seconds} s"
        raise TooSlow(f"{came}, the longest that a body may take; send less at once") from error
    hold.complete = True
    encoding = ", ".join(request.headers.getlist("content-encoding"))
    sent = bytes(hold.sent)
    if not encoding:
        return sent
    body = await to_thread.run_sync(decompress, sent, encoding, limits, limiter=hold.room.unpacking)
    hold.take(len(body))
    return body


async def _receive(request: Request, hold: Hold) -> None:
    limit = hold.room.limits.body_bytes
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > limit:
        raise Rejected("too_large", f"the body has {declared} bytes; at most {limit} are taken")
    async for chunk in request.stream():
        hold.take(len(chunk))
        hold.sent += chunk
        if len(hold.sent) > limit:
            raise Rejected("too_large", f"the body has more than {limit} bytes, the most that are taken")
