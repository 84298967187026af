"""Follow the files of a run: rounds, regret, checkpoints; for the HTTP API, the metrics and the report."""

import contextlib
import itertools
import json
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from deploy.checks.run_folder import adopt_run_defaults
from deploy.telemetry.calibration import CalibrationSums, count_bins
from deploy.telemetry.efficiency import EfficiencySums
from deploy.telemetry.pool import PoolSums, verdict_to_json
from online_meta.learners import meta_learns
from online_meta.regret.ledger import (
    LEVEL_MARGIN,
    UNLEAKED,
    Comparator,
    LossSummary,
    Regret,
    RegretLedger,
    charged_column,
    ledger_columns,
    rounds_column,
)
from online_meta.regret.running_sums import append_round, count_rows, order_values, read_sums, sum_windows
from online_meta.types import Outcome
from streams.atomic_files import replace_file, sync_path
from trainers.checkpoint import list_checkpoints
from trainers.comparators import describe_comparator
from trainers.journal import quarantine
from trainers.journal.jsonl import Line, LineReader, read_line
from trainers.journal.round_records import list_steps
from trainers.journal.run_files import RunFiles
from trainers.learner_settings import POOL, HasLearners, has_pool, list_learners, list_players

VERSION = 2


MAX_UNWRITTEN_ROWS = 4096


class Rows(NamedTuple):
    """The number of rounds in the file and the rows after those, not yet written; replaced together."""

    written: int
    unwritten: list[NDArray[np.float64]]


class RunningSumsFile:
    """A file of running sums; it implements ``RunningSums``.

    Its rows of 8 bytes (float64) per column are those of ``running_sums.count_rows``: the rounds' own values, and sums
    of blocks. A JSON file next to it has the number of valid rounds. Rows stay in memory until ``write``;
    ``should_write()`` says when to call it. One thread at a time may append and write; any thread may read.

    Args:
        path: of the file.
        columns: names of the columns.
    """

    def __init__(self, path: Path, columns: Iterable[str]) -> None:
        """Continue with the content of the file; start empty if it has other columns or cannot be read."""
        self.columns = tuple(columns)
        self._path, self._header_path = path, path.with_name(path.name + ".json")
        self._rounds, self._rows = 0, Rows(0, [])
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            self._restore(json.loads(self._header_path.read_bytes()))

    def _restore(self, header: Mapping[str, Any]) -> None:
        written = int(header["rounds"])
        same = header["version"] == VERSION and tuple(header["columns"]) == self.columns
        if same and self._path.stat().st_size >= count_rows(written) * self._row_bytes:
            self._rounds, self._rows = written, Rows(written, [])

    @property
    def _row_bytes(self) -> int:
        return 8 * len(self.columns)

    def __len__(self) -> int:
        """Return the number of rounds that are summed."""
        return self._rounds

    def clear(self) -> None:
        """Start again without rounds; the file changes at the next ``write``."""
        self._rounds, self._rows = 0, Rows(0, [])

    def append_row(self, row: NDArray[np.float64]) -> None:
        """Append a row of the store."""
        self._rows.unwritten.append(row)

    def take(self, places: Sequence[int]) -> NDArray[np.float64]:
        """Return rows of the store: shape (places, columns). Raises ``OSError`` if the file cannot be read."""
        found = np.zeros((len(places), len(self.columns)))
        rounds, unwritten = self._rows
        written = count_rows(rounds)
        with contextlib.ExitStack() as open_files:
            file = open_files.enter_context(open(self._path, "rb")) if min(places, default=written) < written else None
            # Neighbouring rows of the file are read at once.
            for _, group in itertools.groupby(enumerate(places), lambda item: (item[1] - item[0], item[1] < written)):
                run = list(group)
                (at, place), count = run[0], len(run)
                if place >= written or file is None:
                    found[at : at + count] = unwritten[place - written : place - written + count]
                else:
                    text = os.pread(file.fileno(), count * self._row_bytes, place * self._row_bytes)
                    found[at : at + count] = np.frombuffer(text).reshape(count, -1)
        return found

    def append(self, values: Mapping[str, float]) -> None:
        """Add the values of the next round; columns that are not named get 0."""
        append_round(self, self._rounds, order_values(self.columns, values))
        self._rounds += 1

    def read(self, rounds: Sequence[int]) -> NDArray[np.float64]:
        """Return the sums over the first r rounds for each r of ``rounds``: shape (rounds, columns)."""
        return read_sums(self, rounds)

    def windows(self, edges: Sequence[int]) -> NDArray[np.float64]:
        """Return the sums over the rounds ``edges[i]`` .. ``edges[i + 1]`` - 1: shape (edges - 1, columns)."""
        return sum_windows(self, len(self.columns), edges)

    def rows(self, rounds: Sequence[int]) -> NDArray[np.float64]:
        """Return the values of single rounds: shape (rounds, columns)."""
        return self.take([count_rows(round) for round in rounds]).reshape(-1, len(self.columns))

    def values(self, column: str) -> NDArray[np.float64]:
        """Return the values of a column in every round, shape (rounds,); it reads the whole file."""
        at, found = self.columns.index(column), []
        for first in range(0, self._rounds, MAX_UNWRITTEN_ROWS):
            rounds = range(first, min(first + MAX_UNWRITTEN_ROWS, self._rounds))
            start = count_rows(first)
            rows = self.take(range(start, count_rows(rounds.stop)))
            found.append(rows[[count_rows(round) - start for round in rounds], at])
        return np.concatenate(found) if found else np.zeros(0)

    def should_write(self) -> bool:
        """Return whether at least ``MAX_UNWRITTEN_ROWS`` rounds are in memory."""
        return self._rounds - self._rows.written >= MAX_UNWRITTEN_ROWS

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
            file.seek(count_rows(before) * self._row_bytes)
            file.write(np.stack(unwritten).tobytes())
            file.flush()
            os.fsync(file.fileno())
        header = {"version": VERSION, "columns": self.columns, "rounds": self._rounds}
        replace_file(self._header_path, json.dumps(header).encode(), durable=True)
        self._rows = Rows(self._rounds, [])


LINE_LENGTH, SKIPPED, QUARANTINED = "line length", "skipped rounds", "quarantined rounds"
STEPS, SKIPPED_STEPS = "meta steps", "skipped steps"
LOSS_BEFORE, ROUNDS_BEFORE = "loss before", "rounds before"
CONTENT, DUPLICATES, OVERLAPS, LEAKS = "task content", "duplicate tasks", "overlapping tasks", "leaking tasks"
"""Columns in addition to those of the ledger; no learner's name has a space."""
CONTENT_DIGITS = 13
"""The hexadecimal digits of a content digest that ``CONTENT`` has: 52 bits, which a float64 holds exactly."""


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


class Scored(NamedTuple):
    """What the rounds of a run score.

    Attributes:
        names: of the answers, the leading learner's first.
        outcome: what the model's output says about a target; None if unknown.
    """

    names: tuple[str, ...]
    outcome: Outcome | None = None


def open_view(files: RunFiles, config: HasLearners, scored: Scored | None = None) -> "RunView":
    """Return a view of a run.

    Args:
        files: of the run.
        config: of the run; what it leaves open is as in the run.
        scored: what its rounds score; by default the learners' own answers, without figures of a distribution.
    """
    config = adopt_run_defaults(config, files)
    learners, regret = list_learners(config), config.regret
    scored = scored or Scored(list_players(config))
    pool = POOL if has_pool(config) else None
    return RunView(
        files,
        scored.names,
        regret.prefixes,
        regret.proficiency,
        regret.level_margin,
        count_bins(scored.outcome),
        PoolSums(scored.names, pool, {learner.name: meta_learns(learner.kind) for learner in learners}),
    )


class SeenContents:
    """The contents of the rounds so far, in 8 bytes each.

    Args:
        contents: of the first rounds, as numbers; 0 is unknown.
    """

    def __init__(self, contents: NDArray[np.float64]) -> None:
        """Start with the first rounds."""
        self._sorted = np.unique(contents[contents > 0])
        self._recent: set[float] = set()

    def add(self, content: float) -> bool:
        """Add the content of the next round, and return whether it has occurred before; 0 is unknown."""
        if not content:
            return False
        at = int(np.searchsorted(self._sorted, content))
        if content in self._recent or (at < len(self._sorted) and self._sorted[at] == content):
            return True
        self._recent.add(content)
        if len(self._recent) >= MAX_UNWRITTEN_ROWS:
            self._sorted, self._recent = np.union1d(self._sorted, [*self._recent]), set()
        return False


class RunView:
    """A view of a run's files. Its sums over rounds are in a file; memory grows by 8 bytes per round, for the contents.

    Args:
        files: of the run.
        learners: names of the learners, the leading one first.
        prefixes: lengths of the support set's prefixes after which tasks are scored.
        proficiency: loss or accuracy whose reaching is summed; None for none.
        level_margin: the share of the other's mean loss within which two learners count as level.
        calibration_bins: from ``count_bins``.
        pool: the pool, and which learners learn across tasks; None for no pool, and that all of them do.
    """

    def __init__(
        self,
        files: RunFiles,
        learners: tuple[str, ...],
        prefixes: tuple[int, ...] = (),
        proficiency: float | None = None,
        level_margin: float = LEVEL_MARGIN,
        calibration_bins: int = 0,
        pool: PoolSums | None = None,
    ) -> None:
        """Continue after the last round in the file of sums."""
        self.pool = pool or PoolSums(learners)
        self.efficiency = EfficiencySums(learners, prefixes, proficiency)
        self.calibration = CalibrationSums(learners, calibration_bins)
        own = (LINE_LENGTH, SKIPPED, QUARANTINED, LOSS_BEFORE, ROUNDS_BEFORE, STEPS, SKIPPED_STEPS)
        leaks = (CONTENT, DUPLICATES, OVERLAPS, LEAKS)
        accuracies = [column(name) for name in learners for column in (accuracy_column, accuracy_count_column)]
        columns = (
            *own,
            *leaks,
            *ledger_columns(learners, learners[0], self.pool.pool),
            *accuracies,
            *self.efficiency.columns(),
        )
        columns += (*self.calibration.columns(), *self.pool.columns())
        self.sums = RunningSumsFile(files.sums, columns)
        self.comparators: list[Comparator] = []
        self.comparator_regrets: list[Regret] = []
        self.refreshed: dict[str, float] = {}
        self._waiting: list[Comparator] = []
        self.checkpoint: Line | None = None
        self._files = files
        self.last = self._restore()
        self.ledger = RegretLedger(
            learners, self.sums, leader=learners[0], pool=self.pool.pool, level_margin=level_margin
        )
        self._level_margin = level_margin
        self._contents = SeenContents(self.sums.values(CONTENT))
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
        start, end = self.sums.read([rounds - 1, rounds])[:, self.sums.columns.index(LINE_LENGTH)]
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
                comparator = self._waiting.pop(0)
                self.ledger.compare(comparator)
                self.comparator_regrets.append(self.ledger.regret_against(comparator))
                self.comparators.append(comparator)
            for line in self._checkpoints.lines():
                self.checkpoint = line
                on_checkpoint(line)
            for found in self.quarantine.refresh():
                on_quarantine(found)

    def close(self) -> None:
        """Write the sums, so that the next view of the run does not have to compute them."""
        with self._lock:
            self._write()

    def newest_checkpoint(self) -> int | None:
        """Return the number of learned rounds in the newest complete checkpoint on disk; None if there is none."""
        return max(list_checkpoints(self._files.checkpoints), default=None)

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
        return dict(zip(self.sums.columns, self.sums.windows([max(rounds - 100, 0), rounds])[0].tolist(), strict=True))

    def learners(self) -> dict[str, dict[str, Any]]:
        """Return the summary of each learner, as in the report."""
        last = self.last_100()
        return {name: self._summarise(name, last) for name in self.ledger.learners}

    def _summarise(self, name: str, last: Mapping[str, float]) -> dict[str, Any]:
        """Return a learner's sums and means, each mean with the number of rounds that it is over."""
        whole, unleaked = (self.ledger.summarise(name, leaks=leaks) for leaks in (True, False))
        recent, recent_unleaked = (
            LossSummary(last[prefix + name], *(int(last[prefix + of(name)]) for of in (rounds_column, charged_column)))
            for prefix in ("", UNLEAKED)
        )
        judged = last[accuracy_count_column(name)]
        return {
            "cumulative_loss": whole.total,
            "rounds": whole.rounds,
            "charged_rounds": whole.charged,
            "mean_loss_last_100": recent.mean(),
            "rounds_last_100": recent.rounds,
            "charged_rounds_last_100": recent.charged,
            "mean_accuracy_last_100": last[accuracy_column(name)] / judged if judged else None,
            "accuracy_rounds_last_100": int(judged),
            "without_leaks": {
                "cumulative_loss": unleaked.total,
                "rounds": unleaked.rounds,
                "mean_loss_last_100": recent_unleaked.mean(),
                "rounds_last_100": recent_unleaked.rounds,
            },
            **self.efficiency.summarise(name, last),
            **self.calibration.summarise(name, last),
        }

    def leaks(self) -> dict[str, int]:
        """Return the number of rounds that repeat an earlier one's content, whose sets overlap, and of either kind."""
        sums = dict(zip(self.sums.columns, self.sums.read([len(self.sums)])[0], strict=True))
        return {"duplicates": int(sums[DUPLICATES]), "overlaps": int(sums[OVERLAPS]), "rounds": int(sums[LEAKS])}

    def regret(self) -> dict[str, dict[str, Any]]:
        """Return the regret against every baseline and comparator, as in the report."""
        unleaked = self.ledger.regret(leaks=False)
        found = {}
        for against, regret in self.ledger.regret().items():
            found[against] = regret._asdict()
            if against in unleaked:
                found[against]["without_leaks"] = unleaked[against]._asdict()
            else:
                found[against] |= describe_comparator(self.ledger.comparator(against), regret)
        return found

    def verdict(self) -> dict[str, Any]:
        """Return whether meta-learning pays, as in the report; see ``online_meta.regret.verdict``."""
        return verdict_to_json(self.pool.judge(self.ledger, self.last_100(), self._level_margin))

    def _record(self, line: Line) -> None:
        played, steps = line["learners"], list_steps(line)
        content = float(int(line.get("content", "0")[:CONTENT_DIGITS], 16))
        duplicate, overlap = self._contents.add(content), bool(line.get("overlap"))
        extra = {
            LINE_LENGTH: float(self._rounds.position - self._position),
            SKIPPED: float(line["skipped"] not in (None, quarantine.QUARANTINED)),
            QUARANTINED: float(line["skipped"] == quarantine.QUARANTINED),
            STEPS: len(steps),
            SKIPPED_STEPS: sum(step["skipped"] is not None for step in steps),
            CONTENT: content,
            DUPLICATES: float(duplicate),
            OVERLAPS: float(overlap),
            LEAKS: float(duplicate or overlap),
        }
        if line["skipped"] is not None or not played:
            self.ledger.record(None, extra)
        else:
            charges = {name: one["charged"] for name, one in played.items() if "charged" in one}
            before = played[self.ledger.leader]["loss_before"]
            extra |= {LOSS_BEFORE: charges[self.ledger.leader] if before is None else before, ROUNDS_BEFORE: 1.0}
            playing = [name for name in self.ledger.learners if name in played]
            for name in playing:
                accuracy = played[name]["accuracy"]
                extra |= {
                    accuracy_column(name): accuracy or 0.0,
                    accuracy_count_column(name): float(accuracy is not None),
                }
            extra |= self.efficiency.figures(line) | self.calibration.figures(line) | self.pool.figures(line)
            losses = {name: played[name]["loss_after"] for name in playing}
            self.ledger.record(losses, extra, charge=max(charges.values(), default=None), leaked=duplicate or overlap)
        self.last, self._position = line, self._rounds.position

    def _write(self) -> None:
        """Make the lines durable and write the sums; if that fails, they stay in memory."""
        try:
            sync_path(self._files.rounds)
            self.sums.write()
        except OSError as error:
            log.warning("%s cannot be written now: %s", self._files.sums, error)
