"""Work that is done beside the rest."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor


class Aside:
    """Does one piece of work at a time in a thread of its own; what it raises, the next call raises."""

    def __init__(self, name: str) -> None:
        """Start nothing yet; ``name`` is the thread's."""
        self._pool = ThreadPoolExecutor(1, thread_name_prefix=name)
        self._last: Future[None] | None = None

    def idle(self) -> bool:
        """Return whether nothing is being done; raises what the last work raised."""
        if self._last is not None and self._last.done():
            self.finish()
        return self._last is None

    def start(self, work: Callable[[], None]) -> None:
        """Begin ``work``, when what was begun before is done; raises what that raised."""
        self.finish()
        self._last = self._pool.submit(work)

    def finish(self) -> None:
        """Wait until all is done; raises what it raised."""
        last, self._last = self._last, None
        if last is not None:
            last.result()

    def close(self) -> None:
        """End the thread; work that was begun is done first."""
        self._pool.shutdown()
