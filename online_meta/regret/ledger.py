"""Keep the regret ledger: every learner's loss in each round, and the regret against every comparator."""

import math
from array import array
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray


class RunningSum(NamedTuple):
    """A float sum that keeps the rounding errors in a second term (Neumaier, 1974).

    Its error is at most 1 ulp, plus n^2 * 2^-106 * sum |x_i| over n terms: 1 ulp over millions of losses of one sign.
    """

    total: float = 0.0
    compensation: float = 0.0

    def plus(self, value: float) -> "RunningSum":
        """Return the sum with ``value`` added."""
        total = self.total + value
        big, small = (self.total, value) if abs(self.total) >= abs(value) else (value, self.total)
        return RunningSum(total, self.compensation + ((big - total) + small))

    def value(self) -> float:
        """Return the sum as one float."""
        return self.total + self.compensation


class RunningSums(Protocol):
    """Cumulative sums of named columns over the rounds, with one row after each round.

    The mean over any interval of rounds is the difference of two rows divided by its length.
    """

    @property
    def columns(self) -> tuple[str, ...]:
        """The names of the columns."""

    def __len__(self) -> int:
        """Return the number of rounds."""

    def append(self, values: Mapping[str, float]) -> None:
        """Add the values of the next round; columns that are not named get 0."""

    def read(self, rounds: Sequence[int]) -> NDArray[np.float64]:
        """Return the sums over the first r rounds for each r of ``rounds``: shape (rounds, columns)."""


class MemoryRunningSums:
    """``RunningSums`` in memory, with 8 bytes per round and column."""

    def __init__(self, columns: Iterable[str]) -> None:
        """Start before round 0 with these columns."""
        self.columns = tuple(columns)
        self._running = [RunningSum()] * len(self.columns)
        self._rows = array("d", [0.0] * len(self.columns))

    def __len__(self) -> int:
        """Return the number of rounds."""
        return len(self._rows) // len(self.columns) - 1

    def append(self, values: Mapping[str, float]) -> None:
        """Add the values of the next round; columns that are not named get 0."""
        self._running = add_values(self._running, self.columns, values)
        self._rows.extend(one.value() for one in self._running)

    def read(self, rounds: Sequence[int]) -> NDArray[np.float64]:
        """Return the sums over the first r rounds for each r of ``rounds``: shape (rounds, columns)."""
        width = len(self.columns)
        rows = [self._rows[round * width : (round + 1) * width] for round in rounds]
        return np.array(rows).reshape(-1, width)


def add_values(running: Sequence[RunningSum], columns: Sequence[str], values: Mapping[str, float]) -> list[RunningSum]:
    """Return the running sums with the values of a round added; columns that are not named get 0."""
    return [one.plus(values.get(column, 0.0)) for one, column in zip(running, columns, strict=True)]


MAIN_LEARNER = "ftml"
"""The learner whose regret is computed."""


class Comparator(NamedTuple):
    """The cumulative loss of a comparator over the rounds 0..``as_of_round`` - 1.

    Attributes:
        kind: ``closed_form``: the best fixed meta-parameters in closed form; ``hindsight``: an upper estimate of their
            loss by training; ``dynamic``: an upper estimate of the loss of each task's own best parameters.
        as_of_round: the number of rounds.
        cumulative_loss: the sum of the query losses over these rounds, in nats or squared units of y.
        standard_error: the standard error of the cumulative loss, 0 if every round was evaluated.
        settled: whether the loss had stopped decreasing in the training of an estimate.
    """

    kind: str
    as_of_round: int
    cumulative_loss: float
    standard_error: float
    settled: bool = True


class Regret(NamedTuple):
    """The regret sum_t f_t(U_t(w_t)) - comparator's loss over the first ``as_of_round`` rounds.

    A negative ``value`` means that the learner lost less than the comparator. ``kind`` is that of the comparator, or
    "baseline" for another learner.
    """

    value: float
    standard_error: float
    as_of_round: int
    kind: str


class RegretLedger:
    """The record of each learner's loss after adaptation, scored before learning, and of the regret.

    regret_T(against) = sum_{t<T} f_t(U_t(w_t)) - L_T(against) (Finn et al., ICML 2019, eq. 2). Baselines are compared
    at the newest round, comparators at the round up to which they were evaluated.
    """

    def __init__(self, learners: Iterable[str], sums: RunningSums | None = None) -> None:
        """Continue the ledger stored in ``sums``, or start an empty one in memory.

        Args:
            learners: the names of the learners; "ftml" must be among them.
            sums: the running sums, with a column for each learner; None for new sums in memory, which take 8 bytes per
                round and learner.

        Raises:
            ValueError: if "ftml" is not among the learners, or ``sums`` has no column for a learner.
        """
        self.learners = tuple(learners)
        if MAIN_LEARNER not in self.learners:
            raise ValueError(f"learners are {[*self.learners]}: the ledger needs {MAIN_LEARNER!r} among them")
        self._sums: RunningSums = MemoryRunningSums(self.learners) if sums is None else sums
        self._column = {name: self._sums.columns.index(name) for name in self.learners}
        self._comparators: dict[str, Comparator] = {}

    def __len__(self) -> int:
        """Return the number of recorded rounds."""
        return len(self._sums)

    def record(self, losses: Mapping[str, float] | None, extra: Mapping[str, float] | None = None) -> None:
        """Record the next round.

        Args:
            losses: each learner's query loss after adaptation, scored before it learned the task; None for a skipped
                round, which adds 0 to every learner.
            extra: values for other columns of the sums.

        Raises:
            ValueError: if a learner is missing or unknown, or a loss is not finite.
        """
        if losses is None:
            losses = dict.fromkeys(self.learners, 0.0)
        if losses.keys() != set(self.learners):
            learners = sorted(self.learners)
            raise ValueError(f"round {len(self)} has losses of {sorted(losses)}; the learners are {learners}")
        if not all(map(math.isfinite, losses.values())):
            raise ValueError(
                f"round {len(self)} has losses {dict(losses)}: record None for a round whose losses are not finite"
            )
        self._sums.append({**losses, **(extra or {})})

    def compare(self, comparator: Comparator) -> None:
        """Set the newest evaluation of a comparator.

        Raises ``ValueError`` if it covers rounds that are not recorded, or none.
        """
        if not 0 < comparator.as_of_round <= len(self):
            raise ValueError(f"comparator is as of round {comparator.as_of_round}; the ledger has {len(self)} rounds")
        self._comparators[comparator.kind] = comparator

    def cumulative_loss(self, learner: str, rounds: int | None = None) -> float:
        """Return a learner's loss summed over the first ``rounds`` rounds (all by default), in units of the loss.

        Raises ``IndexError`` if fewer rounds are recorded.
        """
        rounds = len(self) if rounds is None else rounds
        if not 0 <= rounds <= len(self):
            raise IndexError(f"rounds is {rounds}; the ledger has {len(self)} rounds")
        return float(self._sums.read([rounds])[0, self._column[learner]])

    def mean_loss(self, learner: str, last: int) -> float | None:
        """Return a learner's mean loss over the last ``last`` rounds, or over all if fewer; None if there are none."""
        count = min(last, len(self))
        if count <= 0:
            return None
        return (self.cumulative_loss(learner) - self.cumulative_loss(learner, len(self) - count)) / count

    def comparator(self, kind: str) -> Comparator | None:
        """Return the newest evaluation of a comparator, or None."""
        return self._comparators.get(kind)

    def regret(self) -> dict[str, Regret]:
        """Return the regret against every evaluated comparator and every baseline, by comparator kind or learner."""
        regrets = {kind: self.regret_against(comparator) for kind, comparator in self._comparators.items()}
        if len(self):
            for name in self.learners:
                if name != MAIN_LEARNER:
                    difference = self.cumulative_loss(MAIN_LEARNER) - self.cumulative_loss(name)
                    regrets[name] = Regret(difference, 0.0, len(self), "baseline")
        return regrets

    def regret_against(self, comparator: Comparator) -> Regret:
        """Return the regret against one evaluation of a comparator, as of its round."""
        lost = self.cumulative_loss(MAIN_LEARNER, comparator.as_of_round)
        value = lost - comparator.cumulative_loss
        return Regret(value, comparator.standard_error, comparator.as_of_round, comparator.kind)
