"""Work that is done beside the rest."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor


class BackgroundTask:
    """Does one piece of work at a time in a thread of its own; what it raises, the next call raises."""

    def __init__(self, name: str) -> None:
        """Start nothing yet; ``name`` is the thread's."""
        self._pool = ThreadPoolExecutor(1, thread_name_prefix=name)
        self._future: Future[None] | None = None

    def is_idle(self) -> bool:
        """Return whether nothing is being done; raises what the last work raised."""
        if self._future is not None and self._future.done():
            self.finish()
        return self._future is None

    def start(self, function: Callable[[], None]) -> None:
        """Begin ``function``, when what was begun before is done; raises what that raised."""
        self.finish()
        self._future = self._pool.submit(function)

    def finish(self) -> None:
        """Wait until all is done; raises what it raised."""
        future, self._future = self._future, None
        if future is not None:
            future.result()

    def close(self) -> None:
        """End the thread; work that was begun is done first."""
        self._pool.shutdown()
