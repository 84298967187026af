"""What travels from a source to the history."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

REASONS = {
    "bad_id": "the id is empty, too long, or not letters, digits, '.', '_', ':' and '-' after a letter or digit",
    "too_large": "more bytes, samples or numbers than the limits allow",
    "unknown_encoding": "the Content-Encoding is none that is taken, or there are several",
    "bad_compression": "a compressed body is damaged, cut off, followed by more, or lies about its size",
    "expands_too_much": "a compressed body becomes more times larger than the limits allow",
    "unreadable": "the bytes are not of the format that they should be of",
    "missing_tensor": "a tensor, or column, that is needed is not there",
    "unknown_tensor": "there is a tensor, or column, of another name",
    "wrong_dtype": "a tensor's element type is not the one that the run expects",
    "wrong_shape": "a tensor's shape is not the one that the run expects, or two that must agree do not",
    "empty_support": "there is no sample to adapt on",
    "empty_query": "there is no sample to be judged on, nor one that could be held out",
    "not_finite": "there is NaN or infinity, or a target that float32 cannot hold",
    "label_out_of_range": "a label is below 0 or not below ways",
    "conflict": "the id belongs to a task of other bytes",
}
"""What each reason means. They are labels of ``tasks_rejected_total`` and names in dead letters, so they stay."""


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
    ``rejection`` says why it was rejected for good. ``ack_id`` is what the source needs to acknowledge the
    arrival; None where it takes no acknowledgements.
    """

    id: str
    body: bytes
    source: str
    cursor: str | None
    rejection: Rejected | None = None
    ack_id: str | None = None


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
    """A stream of arrivals that can be read again from any position it gave."""

    def read(self, after: str | None) -> Iterator[Arrival | None]:
        """Yield the arrivals after the position (None: from the start); None means: nothing now, ask again."""


@runtime_checkable
class Acknowledges(TaskSource, Protocol):
    """What a source has, too, that is to be told which arrivals it need not keep any longer."""

    def ack(self, arrivals: Sequence[Arrival]) -> None:
        """Acknowledge arrivals that are durable, or were rejected for good (``rejection`` says why).

        They come without their bodies, and between two steps of ``read``, in the thread that reads.
        It may be called late, again, or never: what was not settled may be read again, and is known by its id.
        """


@runtime_checkable
class ReportsLag(TaskSource, Protocol):
    """What a source has, too, that can tell how far behind it is, from a thread of its own."""

    def lag(self, after: str | None) -> int | None:
        """Ask how many entries wait behind the position; None: not known now. Raises what the connection raises."""


class BacklogFull(Exception):
    """Too many rounds wait to be learned; ask again after ``retry_after`` seconds."""

    def __init__(self, retry_after: float) -> None:
        """Keep the seconds."""
        super().__init__(f"too many rounds wait to be learned; try again in {retry_after:g} s")
        self.retry_after = retry_after


class IngestClosed(Exception):
    """Nothing is taken any more, for the process is stopping; what was not answered may not have been kept."""
