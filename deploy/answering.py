"""Answers that other threads find, brought to the event loop together."""

import asyncio
import threading
from concurrent.futures import Future
from typing import Any


class FutureBridge:
    """Waits in an event loop for futures of other threads; however many are done at once wake the loop once.

    ``asyncio.wrap_future`` wakes it for each of them, which takes as long as the rest of a small task does.
    """

    def __init__(self) -> None:
        """Nothing is waited for."""
        self._lock = threading.Lock()
        self._done: list[tuple[asyncio.Future[Any], Future[Any]]] = []

    async def wait_for(self, future: "Future[Any]") -> Any:
        """Return what the future gives, or raise what it raises; to be used from one event loop.

        Who is cancelled while waiting leaves the future as it is.
        """
        loop = asyncio.get_running_loop()
        waiting = loop.create_future()

        def on_done(done: "Future[Any]") -> None:
            with self._lock:
                self._done.append((waiting, done))
                first = len(self._done) == 1  # Those that come before the loop has looked, it finds then.
            if first and not loop.is_closed():
                loop.call_soon_threadsafe(self._deliver)

        future.add_done_callback(on_done)
        return await waiting

    def _deliver(self) -> None:
        with self._lock:
            found, self._done = self._done, []
        for waiting, done in found:
            if waiting.done():  # Cancelled: nobody waits any more.
                continue
            error = done.exception()
            if error is None:
                waiting.set_result(done.result())
            else:
                waiting.set_exception(error)
