"""An Ingest over a history that fails on demand."""

import threading
import time
from collections.abc import Callable, Sequence

from streams.history.history import History
from streams.ingest.ingest import Ingest
from streams.types import Arrival, Conflict, Receipt, Record

DEADLINE = 120.0

Open = Callable[..., Ingest]
Arrive = Callable[..., Arrival]


class Faulty(History):
    """A history whose appends fail on demand; it records the ids of each append."""

    fault: Exception | None = None
    poison: str = ""
    batches: list[list[str]]
    gate: threading.Event | None = None

    def append(self, records: Sequence[Record]) -> list[Receipt | Conflict]:
        if self.gate is not None:
            assert self.gate.wait(DEADLINE)
        self.batches = [*getattr(self, "batches", []), [record.id for record in records]]
        if self.fault is not None:
            raise self.fault
        if any(record.id == self.poison for record in records):
            raise TypeError("poison")
        return super().append(records)


class Counts:
    """The callbacks' records of an Ingest, and the number of learned rounds."""

    def __init__(self) -> None:
        self.learned = 0
        self.rejected: list[tuple[str, str]] = []
        self.committed: list[tuple[str, float]] = []


def until(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + DEADLINE
    while not holds():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.002)
