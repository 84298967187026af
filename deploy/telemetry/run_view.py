"""A run as its files tell it: rounds, regret, checkpoints; for the API, the metrics and the report."""

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
from trainers.journal.jsonl import Line, LineReader, read_line
from trainers.journal.round_records import list_steps
from trainers.journal.run_files import RunFiles
from trainers.settings import RegretSettings

VERSION = 1


MAX_UNWRITTEN_ROWS = 4096


class Rows(NamedTuple):
    """How many rows are in the file, and those behind them, which are not yet; replaced as one."""

    written: int
    unwritten: list[NDArray[np.float64]]


class RunningSumsFile:
    """Implements ``RunningSums``: rows of 8 bytes a column in ``path``; a JSON file next to it counts the valid ones.

    ``should_write()`` says that ``write`` is due: what is not written is in memory. One thread at a time appends and
    writes, any may read.
    """

    def __init__(self, path: Path, columns: Iterable[str]) -> None:
        """Go on with what is in the file, or begin before round 0 when it has other columns or cannot be read."""
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
        """How many rounds are summed."""
        return self._rows.written + len(self._rows.unwritten)

    def clear(self) -> None:
        """Begin anew before round 0."""
        self._rows, self._running = Rows(0, []), [RunningSum()] * len(self.columns)

    def append(self, values: Mapping[str, float]) -> None:
        """Add the figures of the next round; those that are not named are 0."""
        self._running = add_values(self._running, self.columns, values)
        self._rows.unwritten.append(np.array([one.value() for one in self._running]))

    def read(self, rounds: Sequence[int]) -> NDArray[np.float64]:
        """Return the sums over the first so many rounds, for each of ``rounds``: (rounds, columns).

        Raises ``OSError`` when the file cannot be read.
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
        """Say whether there is much to write."""
        return len(self._rows.unwritten) >= MAX_UNWRITTEN_ROWS

    def write(self) -> None:
        """Write what is in memory; the lines of its rounds have to be durable. Raises ``OSError`` when it can't be."""
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


LINE_LENGTH, SKIPPED, LOSS_BEFORE, STEPS, SKIPPED_STEPS = (
    "line length",
    "skipped",
    "loss before",
    "meta steps",
    "skipped steps",
)
"""Columns beside those of the learners' losses: each is summed over the rounds."""


LineCallback = Callable[[Line], None]


log = logging.getLogger(__name__)


def _ignore(line: Line) -> None:
    pass


def accuracy_column(learner: str) -> str:
    """Return the column of a learner's accuracies."""
    return f"accuracy {learner}"


def accuracy_count_column(learner: str) -> str:
    """Return the column that counts the rounds of which a learner's accuracy is known."""
    return f"judged {learner}"


def open_view(files: RunFiles, regret: RegretSettings) -> "RunView":
    """Follow the run in ``files`` as its configuration has it scored."""
    return RunView(files, (MAIN_LEARNER, *regret.baselines), regret.prefixes, regret.proficiency)


class RunView:
    """Follows the files of a run; its sums over the rounds lie in a file, so its memory does not grow with them."""

    def __init__(
        self,
        files: RunFiles,
        learners: tuple[str, ...],
        prefixes: tuple[int, ...] = (),
        proficiency: float | None = None,
    ) -> None:
        """Follow the run in ``files``, played by ``learners``, from where the sums end.

        The learning efficiency is summed of the ``prefixes`` that tasks are scored after and, on the way to it, of a
        ``proficiency``.
        """
        self.efficiency = EfficiencySums(learners, prefixes, proficiency)
        extra = [
            column(name) for name in learners for column in (accuracy_column, accuracy_count_column)
        ] + self.efficiency.columns()
        self.sums = RunningSumsFile(
            files.sums, (LINE_LENGTH, SKIPPED, LOSS_BEFORE, STEPS, SKIPPED_STEPS, *learners, *extra)
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
        self._comparators, self._checkpoints = LineReader(files.comparators), LineReader(files.checkpoint_log)
        self._lock = Lock()

    def _restore(self) -> Line | None:
        """Return the line of the last round that is summed; where there is none such, the sums are begun anew."""
        rounds = len(self.sums)
        if not rounds:
            return None
        start, end = self.sums.read([rounds - 1, rounds])[:, 0]
        found = read_line(self._files.rounds, int(start))
        if found is not None and found[0].get("round") == rounds - 1 and found[1] == int(end):
            return found[0]
        log.warning("%s does not fit %s and is made anew", self._files.sums, self._files.rounds)
        self.sums.clear()
        return None

    def refresh(self, on_round: LineCallback = _ignore, on_checkpoint: LineCallback = _ignore) -> None:
        """Read what is new, and tell of each new line."""
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
            # A comparator can be durable before the rounds that it covers are: after a power loss they come again.
            while self._waiting and self._waiting[0].as_of_round <= len(self.ledger):
                self.comparators.append(self._waiting.pop(0))
                self.ledger.compare(self.comparators[-1])
            for line in self._checkpoints.lines():
                self.checkpoint = line
                on_checkpoint(line)

    def close(self) -> None:
        """Write the sums, so that the next one that follows the run need not make them."""
        with self._lock:
            self._write()

    def learned(self) -> int:
        """How many rounds have been played, skipped ones included."""
        return len(self.sums)

    def total(self, column: str) -> float:
        """Return the sum of a column over all rounds."""
        return float(self.sums.read([len(self.sums)])[0, self.sums.columns.index(column)])

    @property
    def skipped(self) -> int:
        """How many rounds were skipped."""
        return int(self.total(SKIPPED))

    def round(self, round: int) -> Line | None:
        """The line of a round; None when it has not been played."""
        if round >= len(self.sums):
            return None
        found = read_line(self._files.rounds, int(self.sums.read([round])[0, 0]))
        return None if found is None else found[0]

    def last_100(self) -> dict[str, float]:
        """The sum of each column over the last 100 rounds."""
        rounds = len(self.sums)
        early, late = self.sums.read([max(rounds - 100, 0), rounds])
        return dict(zip(self.sums.columns, (late - early).tolist(), strict=True))

    def learners(self) -> dict[str, dict[str, Any]]:
        """The summary of each learner, as the report has it."""
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
        """The regret against every comparator, as the report has it."""
        return {against: regret._asdict() for against, regret in self.ledger.regret().items()}

    def _record(self, line: Line) -> None:
        played, steps = line["learners"], list_steps(line)
        extra = {
            LINE_LENGTH: float(self._rounds.position - self._position),
            SKIPPED: float(line["skipped"] is not None),
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
        """Write the sums, of lines that are durable; what the disk does not take now stays in memory."""
        try:
            sync_path(self._files.rounds)
            self.sums.write()
        except OSError as error:
            log.warning("%s cannot be written now: %s", self._files.sums, error)
