"""Define the types that pass from a source to the history, and the interface of a source."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

REASONS = {
    "bad_id": "the id is empty, too long, or not letters, digits, '.', '_', ':' and '-' after a letter or digit",
    "too_large": "more bytes, samples or numbers than the limits allow",
    "unknown_encoding": "the Content-Encoding is not supported, or there are several",
    "bad_compression": "a compressed body is damaged, truncated, followed by more bytes, or declares a wrong size",
    "expands_too_much": "a compressed body expands by a larger factor than the limits allow",
    "unreadable": "the bytes do not have the expected format",
    "missing_tensor": "a required tensor, or column, is missing",
    "unknown_tensor": "there is a tensor, or column, with an unexpected name",
    "wrong_dtype": "the dtype of a tensor is not the one that the run expects",
    "wrong_shape": "the shape of a tensor is not the one that the run expects, or two shapes that must agree do not",
    "empty_support": "the support set has no samples, or none that counts",
    "empty_query": "the query set has no samples that count, and none can be held out from the support set",
    "not_finite": "a value is NaN or infinite, or a target exceeds the range of float32",
    "label_out_of_range": "a label is below 0 or not below ways",
    "bad_target": "a count is negative or not whole, or soft labels are negative or do not sum to 1",
    "bad_weight": "the weight of a sample is negative",
    "model_error": "the model raises an exception on the task",
    "no_distribution": "the answer was to have a spread or probabilities, which the run's loss does not give",
    "fixed_samples": "the answer was to have a number of samples, and the learner that answers has a fixed number",
    "outlier": "the numbers are far larger than those of the source's tasks before",
    "forgotten": "the task was erased with its entity; no dead letter is kept",
    "conflict": "the id belongs to a task with a different body",
}
"""The meaning of each reason. Reasons are labels of ``tasks_rejected_total`` and occur in dead letters: keep them."""


class Rejected(Exception):
    """A task was rejected for good.

    Attributes:
        reason: a key of ``REASONS``, also used as a metric label.
        detail: a sentence that explains the rejection.
        evidence: the numbers that led to the rejection, for the dead letter; empty if there are none.
    """

    def __init__(self, reason: str, detail: str, evidence: Mapping[str, str | float] | None = None) -> None:
        """Store the reason, the detail and the evidence."""
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail
        self.evidence = dict(evidence or {})


class Arrival(NamedTuple):
    """A task as received from a source.

    Attributes:
        id: the id of the task.
        body: its bytes, as ``wire.encode`` writes them; the bytes as received if it is rejected.
        source: the name of the source.
        cursor: the position after the arrival, for ``TaskSource.read(after=cursor)``; None if the source has none.
        rejection: why the arrival is rejected for good; None if it is not.
        ack_id: what the source needs to acknowledge the arrival; None if it takes no acknowledgements.
    """

    id: str
    body: bytes
    source: str
    cursor: str | None
    rejection: Rejected | None = None
    ack_id: str | None = None


class Receipt(NamedTuple):
    """The answer to an arrival that is durable: its ``round``, and whether it is a ``duplicate`` of an earlier one."""

    id: str
    round: int
    duplicate: bool


class Conflict(NamedTuple):
    """The answer to an arrival whose id is taken: the ``round`` with that id has a different body."""

    id: str
    round: int


class Scales(NamedTuple):
    """The root mean squares of a task's inputs ``x`` and of its targets ``y``; None where there is none."""

    x: float | None
    y: float | None


class Record(NamedTuple):
    """A task to append to the history.

    Attributes:
        id: the id of the task.
        payload: the task as ``wire.encode`` writes it.
        digest: the SHA-256 of the body as received, 32 bytes.
        source: the name of the source.
        cursor: the source's position after the task; None if the source has none.
        arrived: the Unix time of arrival in seconds.
        scales: the scales to keep with the task; None keeps none.
    """

    id: str
    payload: bytes
    digest: bytes
    source: str
    cursor: str | None
    arrived: float
    scales: Scales | None = None


class Gap(NamedTuple):
    """Entries of a stream that its broker deleted before they were read.

    Attributes:
        where: the stream or partition.
        first: the first missing position.
        last: the last missing position.
        entries: how many are missing; None if it is unknown.
    """

    where: str
    first: str
    last: str
    entries: int | None


class TaskSource(Protocol):
    """A stream of arrivals that can be read again from the ``cursor`` of any arrival; see ``streams.sources``."""

    def read(self, after: str | None) -> Iterator[Arrival | None]:
        """Yield the arrivals after a position.

        Args:
            after: the ``cursor`` of an earlier arrival; None to read from the start.

        Yields:
            Arrivals in order, and None when there is nothing now; the iterator does not end.

        Raises:
            ValueError: if ``after`` is not a position of this source.
            Exception: if the connection is lost; ``read`` is then called again.
        """


@runtime_checkable
class Acknowledges(TaskSource, Protocol):
    """A source that takes acknowledgements, so that it need not keep the acknowledged arrivals."""

    def ack(self, arrivals: Sequence[Arrival]) -> None:
        """Acknowledge arrivals that are durable or were rejected for good.

        The reading thread calls this between two steps of ``read``. It may call it late, repeatedly or never: an
        unacknowledged arrival may be read again and is then recognised by its id.

        Args:
            arrivals: arrivals without their bodies; ``rejection`` is set for rejected ones.
        """


@runtime_checkable
class ReportsLag(TaskSource, Protocol):
    """A source that can report its lag."""

    def lag(self, after: str | None) -> int | None:
        """Return the number of entries that wait after a position; None if it is unknown.

        Another thread than the reading one calls this. Raises whatever the connection raises.

        Args:
            after: the committed ``cursor``; None if there is none.
        """


@runtime_checkable
class ReportsGaps(TaskSource, Protocol):
    """A source whose broker may delete entries before they are read, and which notices it."""

    def listen_for_gaps(self, listener: Callable[[Gap], None]) -> None:
        """Call ``listener``, in the reading thread, with each gap that is found from now on."""


class ErasedEntity(NamedTuple):
    """An entity whose rows up to a position were erased: what recognises its key, and the position as its cursor."""

    names_key: Callable[[str], bool]
    cursor: str


@runtime_checkable
class SavesState(TaskSource, Protocol):
    """A source that saves what it has learned from the rows read, so that a restart need not read them all again."""

    def save_in(self, folder: Path, erased: "Sequence[ErasedEntity]" = ()) -> None:
        """Save the state in a folder from now on, and continue from what is there.

        It is called before the first ``read``. A state that is lost is made again from the rows.

        Args:
            folder: of the run, for all sources; it need not exist.
            erased: the entities whose rows up to a position count for nothing, although they are still there.

        Raises:
            ValueError: if other options wrote the state that is there.
        """


@runtime_checkable
class ReportsOmissions(TaskSource, Protocol):
    """A source that can say what it leaves out."""

    def omissions(self) -> Sequence[str]:
        """Return what the source ignores now, and why, a sentence each; any thread may call this."""


class BacklogFull(Exception):
    """Too many rounds wait to be learned; try again after ``retry_after`` seconds."""

    def __init__(self, retry_after: float) -> None:
        """Store the seconds to wait."""
        super().__init__(f"too many rounds wait to be learned; try again in {retry_after:g} s")
        self.retry_after = retry_after


class IngestClosed(Exception):
    """No more tasks are accepted because the process is stopping; unanswered tasks may not have been stored."""
