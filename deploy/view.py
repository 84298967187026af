"""A run as its files tell it: rounds, regret, checkpoints; for the API, the metrics and the report."""

from array import array
from math import nan
from threading import Lock
from typing import Any

from online_meta.regret import Comparator, RegretLedger
from trainers.json_lines import Line, LineReader
from trainers.run_files import RunFiles


class RunView:
    """Follows the files of a run; keeps some 24 bytes a round and as many for each learner in memory."""

    def __init__(self, files: RunFiles, learners: tuple[str, ...]) -> None:
        """Follow the run in ``files``, played by ``learners``."""
        self.ledger = RegretLedger(learners)
        self.before, self.after = array("d"), array("d")
        self.accuracy = {name: array("d") for name in learners}
        self.comparators: list[Comparator] = []
        self._waiting: list[Comparator] = []
        self.last: Line | None = None
        self.checkpoint: Line | None = None
        self.skipped = 0
        self._rounds, self._comparators = LineReader(files.rounds), LineReader(files.comparators)
        self._checkpoints = LineReader(files.checkpoint_log)
        self._lock = Lock()

    def refresh(self) -> tuple[list[Line], list[Line]]:
        """Read what is new; return the new lines of rounds and of checkpoints."""
        with self._lock:
            lines = self._rounds.refresh()
            for line in lines:
                self._record(line)
            self._waiting += [
                Comparator(*(line[key] for key in Comparator._fields)) for line in self._comparators.refresh()
            ]
            # A comparator can be durable before the rounds that it covers are: after a power loss they come again.
            while self._waiting and self._waiting[0].as_of_round <= len(self.ledger):
                self.comparators.append(self._waiting.pop(0))
                self.ledger.compare(self.comparators[-1])
            checkpoints = self._checkpoints.refresh()
            self.checkpoint = checkpoints[-1] if checkpoints else self.checkpoint
            return lines, checkpoints

    def learned(self) -> int:
        """How many rounds have been played, skipped ones included."""
        return len(self.ledger)

    def round(self, round: int) -> Line | None:
        """The line of a round; None when it has not been played."""
        with self._lock:
            return self._rounds[round] if round < len(self._rounds) else None

    def learners(self) -> dict[str, dict[str, float | None]]:
        """The summary of each learner, as the report has it."""
        return {
            name: {
                "cumulative_loss": self.ledger.cumulative_loss(name),
                "mean_loss_last_100": self.ledger.mean_loss(name, 100),
                "mean_accuracy_last_100": _mean(self.accuracy[name][-100:]),
            }
            for name in self.ledger.learners
        }

    def regret(self) -> dict[str, dict[str, Any]]:
        """The regret against every comparator, as the report has it."""
        return {against: regret._asdict() for against, regret in self.ledger.regret().items()}

    def _record(self, line: Line) -> None:
        played = line["learners"]
        losses = {name: played[name]["loss_after"] for name in self.ledger.learners} if played else None
        self.ledger.record(losses)
        self.skipped += line["skipped"] is not None
        self.before.append(_number(line["loss_before"]))
        self.after.append(_number(line["loss_after"]))
        for name, values in self.accuracy.items():
            values.append(_number(played[name]["accuracy"] if played else None))
        self.last = line


def _number(value: float | None) -> float:
    return nan if value is None else value


def _mean(values: "array[float]") -> float | None:
    known = [value for value in values if value == value]
    return sum(known) / len(known) if known else None
