"""Log the rounds that no learner may learn, before it takes effect; restarts and replays follow the log."""

import bisect
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice, takewhile
from pathlib import Path
from threading import Lock
from typing import Literal, NamedTuple

from trainers.journal.jsonl import Line, LineReader, LineWriter

Reason = Literal["model_error", "process_death", "operator", "forgotten"]
QUARANTINED = "quarantined"
"""Value of ``skipped`` in the record of a round that no learner has learned."""

FOR_GOOD = ("operator", "forgotten")
"""The reasons that apply under all settings, and are no sign that the model is wrong."""

WINDOW, MAX_IN_WINDOW = 100, 10
"""A run stops when more than ``MAX_IN_WINDOW`` of the last ``WINDOW`` rounds were quarantined without an operator."""

DEATHS = 2
"""Number of process deaths in the update of one round that quarantine the round."""


class TooManyQuarantined(RuntimeError):
    """So many rounds were quarantined that the model rather than the tasks must be wrong."""


class Quarantine(NamedTuple):
    """The quarantine of a round.

    A round that is quarantined before it was learned (``round`` >= ``at``) is neither scored nor learned. One that was
    learned before is not revisited any more; its record stays.

    Attributes:
        round: number of the round.
        at: first round of the first update without it.
        reason: "model_error" (the model raised an exception), "process_death" (the process died in the update of this
            round, twice), "operator", or "forgotten" (its task was erased with its entity; or retention has removed it,
            and after an erasure before it, it would have to be learned again).
        detail: the exception, the reason that the operator gave, or which of these it is.
        timestamp: Unix time in seconds.
    """

    round: int
    at: int
    reason: Reason
    detail: str
    timestamp: float

    @property
    def was_learned(self) -> bool:
        """Whether the round was learned before it was quarantined."""
        return self.round < self.at


class QuarantineLog:
    """The log of a run's quarantined rounds, in a file next to the history.

    It also counts process deaths: a process that begins an update in which an earlier process died adds an attempt.
    Quarantines by an operator or an erasure apply under all settings; all other lines only under the settings that
    wrote them.

    Args:
        path: of the file, which is created if it does not exist.
        settings: fingerprint of the settings.
    """

    def __init__(self, path: Path, settings: str) -> None:
        """Open the file and read it."""
        self._writer, self._settings = LineWriter(path), settings
        self._lock, self._closed = Lock(), False
        self._by_round: dict[int, Quarantine] = {}
        self._rounds: list[int] = []
        self._attempts: Counter[tuple[int, int]] = Counter()
        self.stopped = False
        """Whether the last process that used the log was asked to stop, so that its end was no death."""
        self.requests = 0
        """Number of operators' requests that are in the log."""
        for line in LineReader(path).refresh():
            self._observe(line)
        # An erasure adds rounds of the past to the log.
        self._by_round = dict(sorted(self._by_round.items(), key=lambda item: item[1].at))

    def _observe(self, line: Line) -> None:
        event, own = line["event"], line.get("settings") == self._settings
        if event == "quarantine":
            self.requests += line["reason"] == "operator"
            if own or line["reason"] in FOR_GOOD:
                self._insert(Quarantine(*(line[key] for key in Quarantine._fields)))
        elif event == "attempt" and own:
            self._attempts[line["round"], line["rounds"]] += 1
        elif event in ("start", "stop"):
            self.stopped = event == "stop"

    def _insert(self, quarantine: Quarantine) -> None:
        if quarantine.round not in self._by_round:
            self._by_round[quarantine.round] = quarantine
            bisect.insort(self._rounds, quarantine.round)

    def add(self, quarantines: Iterable[Quarantine]) -> None:
        """Log quarantines, durably; those of rounds that are quarantined already have no effect."""
        new = list(quarantines)
        self._write([{"event": "quarantine", **one._asdict(), "settings": self._settings} for one in new])
        for one in new:
            self.requests += one.reason == "operator"
            self._insert(one)

    def add_attempt(self, round: int, rounds: int) -> None:
        """Log, durably, that a process begins the update of ``rounds`` rounds in which an earlier process died."""
        self._write([{"event": "attempt", "round": round, "rounds": rounds, "settings": self._settings}])
        self._attempts[round, rounds] += 1

    def count_attempts(self, round: int, rounds: int) -> int:
        """Return the number of logged attempts at an update."""
        return self._attempts[round, rounds]

    def note_start(self) -> None:
        """Log that a process starts to play."""
        self._note("start")

    def note_stop(self) -> None:
        """Log that the process was asked to stop: if it ends in the middle of an update, it has not died.

        Any thread may call this, also after ``close``.
        """
        self._note("stop")

    def _note(self, event: str) -> None:
        self._write([{"event": event}])

    def _write(self, lines: list[Line]) -> None:
        with self._lock:
            if self._closed:
                return
            for line in lines:
                self._writer.append(line)
            self._writer.sync()

    def find(self, round: int) -> Quarantine | None:
        """Return the quarantine of a round that must not be learned; None if it may be learned."""
        found = self._by_round.get(round)
        return None if found is None or found.was_learned else found

    def next_after(self, round: int) -> int | None:
        """Return the first round after ``round`` that an update from ``round`` on must not contain; None if none."""
        later = (self._by_round[one] for one in self._rounds[bisect.bisect_right(self._rounds, round) :])
        return next((one.round for one in later if one.at <= round), None)

    def excluded(self, round: int, known: int = 0) -> list[int]:
        """Return the rounds that an update from ``round`` on must not revisit, without the first ``known`` of them.

        The rounds are in the order in which they were quarantined.
        """
        later = islice(self._by_round.values(), known, None)
        return [one.round for one in takewhile(lambda one: one.at <= round, later)]

    def check_count(self, round: int) -> None:
        """Raise ``TooManyQuarantined`` if too many of the last rounds up to ``round`` are quarantined."""
        last = self._rounds[
            bisect.bisect_right(self._rounds, round - WINDOW) : bisect.bisect_right(self._rounds, round)
        ]
        recent = [self._by_round[one] for one in last if self._by_round[one].reason not in FOR_GOOD]
        if len(recent) > MAX_IN_WINDOW:
            raise TooManyQuarantined(
                f"{len(recent)} of the last {WINDOW} rounds were quarantined, the last one, round {recent[-1].round}, "
                f"because of {recent[-1].detail!r}. The model may be wrong, not the tasks. No task is lost: mend the "
                "model or the source, start again, and send the tasks again with `online-meta quarantine retry`"
            )

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._closed = True
            self._writer.close()


@dataclass
class QuarantineReader:
    """Follows the quarantine log of a run from another process; ``by_round`` has every quarantined round."""

    path: Path

    def __post_init__(self) -> None:
        """Start at the beginning of the log."""
        self.by_round: dict[int, Quarantine] = {}
        self._reader = LineReader(self.path)

    def refresh(self) -> list[Quarantine]:
        """Return the new quarantines."""
        found = [
            Quarantine(*(line[key] for key in Quarantine._fields))
            for line in self._reader.lines()
            if line["event"] == "quarantine"
        ]
        new = {one.round: one for one in reversed(found) if one.round not in self.by_round}
        first = [new[round] for round in dict.fromkeys(one.round for one in found) if round in new]
        self.by_round |= {one.round: one for one in first}
        return first


def make_quarantine(round: int, at: int, reason: Reason, detail: str) -> Quarantine:
    """Return the quarantine of a round from now on."""
    return Quarantine(round, at, reason, detail, time.time())
