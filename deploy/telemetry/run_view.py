"""Follow the files of a run: rounds, regret, checkpoints; for the HTTP API, the metrics and the report."""

import contextlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from deploy.telemetry.efficiency import EfficiencySums
from online_meta.regret.ledger import MAIN_LEARNER, Comparator, RegretLedger, RunningSum, add_values
from streams.atomic_files import replace_file, sync_path
from trainers.journal import quarantine
from trainers.journal.jsonl import Line, LineReader, read_line
from trainers.journal.round_records import list_steps
from trainers.journal.run_files import RunFiles
from trainers.settings import RegretSettings

VERSION = 1


MAX_UNWRITTEN_ROWS = 4096


class Rows(NamedTuple):
    """The number of rows in the file and the following rows, not yet written; replaced together."""

    written: int
    unwritten: list[NDArray[np.float64]]


class RunningSumsFile:
    """A file of running sums; it implements ``RunningSums``.

    Each row has 8 bytes (float64) per column. A JSON file next to it has the number of valid rows. Rows stay in memory
    until ``write``; ``should_write()`` says when to call it. One thread at a time may append and write; any thread may
    read.

    Args:
        path: of the file.
        columns: names of the columns.
    """

    def __init__(self, path: Path, columns: Iterable[str]) -> None:
        """Continue with the content of the file; start empty if it has other columns or cannot be read."""
        self.columns = tuple(columns)
        self._path, self._header_path = path, path.with_name(path.name + ".json")
        self._rows, self._running = Rows(0, []), [RunningSum()] * len(self.columns)
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            self._restore(json.loads(self._header_path.read_bytes()))

    def _restore(self, header: Mapping[str, Any]) -> None:
        written, running = int(header["rounds"]), [RunningSum(*map(float, pair)) for pair in header["sums"]]
        same = header["version"] == VERSION and tuple(header["columns"]) == self.columns
        if same and len(running) == len(self.columns) and self._path.stat().st_size >= written * self._row_bytes:
            self._rows, self._running = Rows(written, []), running

    @property
    def _row_bytes(self) -> int:
        return 8 * len(self.columns)

    def __len__(self) -> int:
        """Return the number of rounds that are summed."""
        return self._rows.written + len(self._rows.unwritten)

    def clear(self) -> None:
        """Start again without rounds; the file changes at the next ``write``."""
        self._rows, self._running = Rows(0, []), [RunningSum()] * len(self.columns)

    def append(self, values: Mapping[str, float]) -> None:
        """Add the values of the next round; columns that are not named get 0."""
        self._running = add_values(self._running, self.columns, values)
        self._rows.unwritten.append(np.array([one.value() for one in self._running]))

    def read(self, rounds: Sequence[int]) -> NDArray[np.float64]:
        """Return the sums over the first n rounds, for each n in ``rounds``.

        Returns:
            An array (len(rounds), columns), float64.

        Raises:
            OSError: if the file cannot be read.
        """
        found = np.zeros((len(rounds), len(self.columns)))
        written, unwritten = self._rows
        with contextlib.ExitStack() as open_files:
            file = open_files.enter_context(open(self._path, "rb")) if written else None
            for at, round in enumerate(rounds):
                if round > written:
                    found[at] = unwritten[round - written - 1]
                elif round and file is not None:
                    found[at] = np.frombuffer(os.pread(file.fileno(), self._row_bytes, (round - 1) * self._row_bytes))
        return found

    def should_write(self) -> bool:
        """Return whether at least ``MAX_UNWRITTEN_ROWS`` rows are in memory."""
        return len(self._rows.unwritten) >= MAX_UNWRITTEN_ROWS

    def write(self) -> None:
        """Write the rows in memory to the file; the lines of their rounds must be durable already.

        Raises:
            OSError: if the file cannot be written.
        """
        before, unwritten = self._rows
        if not unwritten:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with open(self._path, "r+b" if self._path.exists() else "w+b") as file:
            file.seek(before * self._row_bytes)
            file.write(np.stack(unwritten).tobytes())
            file.flush()
            os.fsync(file.fileno())
        written = before + len(unwritten)
        header = {"version": VERSION, "columns": self.columns, "rounds": written, "sums": self._running}
        replace_file(self._header_path, json.dumps(header).encode(), durable=True)
        self._rows = Rows(written, [])


LINE_LENGTH, SKIPPED, QUARANTINED, LOSS_BEFORE, STEPS, SKIPPED_STEPS = (
    "line length",
    "skipped",
    "quarantined",
    "loss before",
    "meta steps",
    "skipped steps",
)
"""Columns in addition to the learners' losses."""


LineCallback = Callable[[Line], None]
QuarantineCallback = Callable[[quarantine.Quarantine], None]


log = logging.getLogger(__name__)


def _ignore(_: object) -> None:
    pass


def accuracy_column(learner: str) -> str:
    """Return the name of the column that sums a learner's accuracies."""
    return f"accuracy {learner}"


def accuracy_count_column(learner: str) -> str:
    """Return the name of the column that counts the rounds with a known accuracy of a learner."""
    return f"judged {learner}"


def open_view(files: RunFiles, regret: RegretSettings) -> "RunView":
    """Return a view of a run.

    Args:
        files: of the run.
        regret: [regret] section of the configuration, which names the learners and what is scored.
    """
    return RunView(files, (MAIN_LEARNER, *regret.baselines), regret.prefixes, regret.proficiency)


class RunView:
    """A view of a run's files. Its sums over rounds are in a file, so that memory does not grow with the rounds.

    Args:
        files: of the run.
        learners: names of the learners.
        prefixes: lengths of the support set's prefixes after which tasks are scored.
        proficiency: loss or accuracy whose reaching is summed; None for none.
    """

    def __init__(
        self,
        files: RunFiles,
        learners: tuple[str, ...],
        prefixes: tuple[int, ...] = (),
        proficiency: float | None = None,
    ) -> None:
        """Continue after the last round in the file of sums."""
        self.efficiency = EfficiencySums(learners, prefixes, proficiency)
        extra = [
            column(name) for name in learners for column in (accuracy_column, accuracy_count_column)
        ] + self.efficiency.columns()
        self.sums = RunningSumsFile(
            files.sums, (LINE_LENGTH, SKIPPED, QUARANTINED, LOSS_BEFORE, STEPS, SKIPPED_STEPS, *learners, *extra)
        )
        self.comparators: list[Comparator] = []
        self.refreshed: dict[str, float] = {}
        self._waiting: list[Comparator] = []
        self.checkpoint: Line | None = None
        self._files = files
        self.last = self._restore()
        self.ledger = RegretLedger(learners, self.sums)
        self._position = int(self.total(LINE_LENGTH))
        self._rounds = LineReader(files.rounds, self._position)
        self.quarantine = quarantine.QuarantineReader(files.quarantine_log)
        self._comparators, self._checkpoints = LineReader(files.comparators), LineReader(files.checkpoint_log)
        self._lock = Lock()

    def _restore(self) -> Line | None:
        """Return the line of the last summed round; clear the sums and return None if the files do not match."""
        rounds = len(self.sums)
        if not rounds:
            return None
        start, end = self.sums.read([rounds - 1, rounds])[:, 0]
        found = read_line(self._files.rounds, int(start))
        if found is not None and found[0].get("round") == rounds - 1 and found[1] == int(end):
            return found[0]
        log.warning("%s does not match %s; rebuilding it", self._files.sums, self._files.rounds)
        self.sums.clear()
        return None

    def refresh(
        self,
        on_round: LineCallback = _ignore,
        on_checkpoint: LineCallback = _ignore,
        on_quarantine: QuarantineCallback = _ignore,
    ) -> None:
        """Read new lines of the run's files; thread-safe.

        Args:
            on_round: called with each new line of ``rounds.jsonl``.
            on_checkpoint: called with each new line of the checkpoint log.
            on_quarantine: called with each new quarantine of a round.
        """
        with self._lock:
            for line in self._rounds.lines():
                self._record(line)
                on_round(line)
                if self.sums.should_write():
                    self._write()
            for line in self._comparators.lines():
                self._waiting.append(Comparator(**{key: line[key] for key in Comparator._fields if key in line}))
                if "timestamp" in line:
                    self.refreshed[line["kind"]] = line["timestamp"]
            # After a power loss, a comparator's line can be on disk while rounds that it covers must be played again.
            while self._waiting and self._waiting[0].as_of_round <= len(self.ledger):
                self.comparators.append(self._waiting.pop(0))
                self.ledger.compare(self.comparators[-1])
            for line in self._checkpoints.lines():
                self.checkpoint = line
                on_checkpoint(line)
            for found in self.quarantine.refresh():
                on_quarantine(found)

    def close(self) -> None:
        """Write the sums, so that the next view of the run does not have to compute them."""
        with self._lock:
            self._write()

    def learned(self) -> int:
        """Return the number of rounds that have been played, including skipped ones."""
        return len(self.sums)

    def total(self, column: str) -> float:
        """Return the sum of a column over all rounds."""
        return float(self.sums.read([len(self.sums)])[0, self.sums.columns.index(column)])

    @property
    def skipped(self) -> int:
        """The number of skipped rounds."""
        return int(self.total(SKIPPED))

    @property
    def quarantined(self) -> int:
        """The number of rounds that were quarantined before any learner learned them."""
        return int(self.total(QUARANTINED))

    def round(self, round: int) -> Line | None:
        """Return the line of a round; None if it has not been played."""
        if round >= len(self.sums):
            return None
        found = read_line(self._files.rounds, int(self.sums.read([round])[0, 0]))
        return None if found is None else found[0]

    def last_100(self) -> dict[str, float]:
        """Return the sum of each column over the last 100 rounds."""
        rounds = len(self.sums)
        early, late = self.sums.read([max(rounds - 100, 0), rounds])
        return dict(zip(self.sums.columns, (late - early).tolist(), strict=True))

    def learners(self) -> dict[str, dict[str, Any]]:
        """Return the summary of each learner, as in the report."""
        last = self.last_100()
        return {
            name: {
                "cumulative_loss": self.ledger.cumulative_loss(name),
                "mean_loss_last_100": self.ledger.mean_loss(name, 100),
                "mean_accuracy_last_100": last[accuracy_column(name)] / last[accuracy_count_column(name)]
                if last[accuracy_count_column(name)]
                else None,
                **self.efficiency.summarise(name, last),
            }
            for name in self.ledger.learners
        }

    def regret(self) -> dict[str, dict[str, Any]]:
        """Return the regret against every baseline and comparator, as in the report."""
        return {against: regret._asdict() for against, regret in self.ledger.regret().items()}

    def _record(self, line: Line) -> None:
        played, steps = line["learners"], list_steps(line)
        extra = {
            LINE_LENGTH: float(self._rounds.position - self._position),
            SKIPPED: float(line["skipped"] not in (None, quarantine.QUARANTINED)),
            QUARANTINED: float(line["skipped"] == quarantine.QUARANTINED),
            LOSS_BEFORE: line["loss_before"] or 0.0,
            STEPS: len(steps),
            SKIPPED_STEPS: sum(step["skipped"] is not None for step in steps),
        }
        for name in self.ledger.learners if played else ():
            known = played[name]["accuracy"] is not None
            extra |= {accuracy_column(name): played[name]["accuracy"] or 0.0, accuracy_count_column(name): float(known)}
        extra |= self.efficiency.figures(line)
        losses = {name: played[name]["loss_after"] for name in self.ledger.learners} if played else None
        self.ledger.record(losses, extra)
        self.last, self._position = line, self._rounds.position

    def _write(self) -> None:
        """Make the lines durable and write the sums; if that fails, they stay in memory."""
        try:
            sync_path(self._files.rounds)
            self.sums.write()
        except OSError as error:
            log.warning("%s cannot be written now: %s", self._files.sums, error)
