"""What travels from a source to the history."""

from collections.abc import Iterator
from typing import NamedTuple, Protocol


class Rejected(Exception):
    """A task that cannot be taken: ``reason`` is a short fixed slug (a metric label), ``detail`` a sentence."""

    def __init__(self, reason: str, detail: str) -> None:
        """Keep the slug and the sentence apart."""
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


class Arrival(NamedTuple):
    """A task as it arrived: its ``id``, wire bytes, the name of its source and the position behind it.

    ``cursor`` is what ``TaskSource.read(after=cursor)`` goes on from; None where a source has no position.
    ``refused`` says why its source could make no task of it; ``body`` is then what the source read.
    """

    id: str
    body: bytes
    source: str
    cursor: str | None
    refused: Rejected | None = None


class Receipt(NamedTuple):
    """The answer to an arrival that is durable: its round, and whether it was there before."""

    id: str
    round: int
    duplicate: bool


class Conflict(NamedTuple):
    """The answer to an arrival whose id is taken: the ``round`` that has it was made of other bytes."""

    id: str
    round: int


class Record(NamedTuple):
    """What the history is asked to keep of an arrival.

    ``payload`` is the task as ``wire.encode`` writes it, ``digest`` the SHA-256 of the body as received (32 bytes),
    ``cursor`` the source's position behind it (None: it has none), ``arrived`` the unix time in seconds.
    """

    id: str
    payload: bytes
    digest: bytes
    source: str
    cursor: str | None
    arrived: float


class TaskSource(Protocol):
    """A stream of arrivals that can be read again from any position it gave.

    A source may also have ``settle(arrival) -> None``: it is told, from any thread, of each of its arrivals that is
    durable (it then comes without its body) or was refused for good (``arrival.refused`` says why).
    """

    def read(self, after: str | None) -> Iterator[Arrival | None]:
        """Yield the arrivals after the position (None: from the start); None means: nothing now, ask again."""


class BacklogFull(Exception):
    """Too many rounds wait to be learned; ask again after ``retry_after`` seconds."""

    def __init__(self, retry_after: float) -> None:
        """Keep the seconds."""
        super().__init__(f"too many rounds wait to be learned; try again in {retry_after:g} s")
        self.retry_after = retry_after


class IngestClosed(Exception):
    """Nothing is taken any more, for the process is stopping; what was not answered may not have been kept."""
