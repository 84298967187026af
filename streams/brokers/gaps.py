"""Record the gaps in a broker's stream: entries that the broker deleted before they were read."""

import logging
from collections.abc import Callable

from streams.types import Gap

_log = logging.getLogger(__name__)


class GapLog:
    """The gaps that a source has found; each is logged once and reported to a listener."""

    def __init__(self, source: str) -> None:
        """Take the name of the source."""
        self._source = source
        self._counts: dict[tuple[str, str], int | None] = {}
        self._listener: Callable[[Gap], None] = lambda gap: None

    def listen(self, listener: Callable[[Gap], None]) -> None:
        """Call ``listener`` with every gap that is found from now on."""
        self._listener = listener

    def note(self, gap: Gap, message: str) -> None:
        """Log a gap with its ``message`` and report it, unless it is known.

        A gap that has grown since it was noted is noted again; the listener then gets the number of added entries.
        """
        key, known = (gap.where, gap.first), 0
        if key in self._counts:
            before = self._counts[key]
            if gap.entries is None or before is None or gap.entries <= before:
                return
            known = before
        self._counts[key] = gap.entries
        _log.error("the source %s: %s", self._source, message)
        self._listener(gap if gap.entries is None else gap._replace(entries=gap.entries - known))
