"""The regret ledger: losses of every learner over the rounds, and regret against every comparator."""

import math
from array import array
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray


class RunningSum(NamedTuple):
    """A float sum with the rounding errors kept aside (Neumaier 1974).

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
        """The sum."""
        return self.total + self.compensation


class RunningSums(Protocol):
    """Figures of each round by column, summed from round 0 on: what each sum was after any number of rounds is known.

    So a mean over any stretch of rounds is a difference of two rows, whatever its length.
    """

    @property
    def columns(self) -> tuple[str, ...]:
        """The names of the figures."""

    def __len__(self) -> int:
        """How many rounds are summed."""

    def append(self, values: Mapping[str, float]) -> None:
        """Add the figures of the next round; those that are not named are 0."""

    def read(self, rounds: Sequence[int]) -> NDArray[np.float64]:
        """Return the sums over the first so many rounds, for each of ``rounds``: (rounds, columns)."""


class MemoryRunningSums:
    """Sums in memory: 8 bytes a round and column."""

    def __init__(self, columns: Iterable[str]) -> None:
        """Begin before round 0."""
        self.columns = tuple(columns)
        self._running = [RunningSum()] * len(self.columns)
        self._rows = array("d", [0.0] * len(self.columns))

    def __len__(self) -> int:
        """How many rounds are summed."""
        return len(self._rows) // len(self.columns) - 1

    def append(self, values: Mapping[str, float]) -> None:
        """Add the figures of the next round; those that are not named are 0."""
        self._running = add_values(self._running, self.columns, values)
        self._rows.extend(one.value() for one in self._running)

    def read(self, rounds: Sequence[int]) -> NDArray[np.float64]:
        """Return the sums over the first so many rounds, for each of ``rounds``: (rounds, columns)."""
        width = len(self.columns)
        rows = [self._rows[round * width : (round + 1) * width] for round in rounds]
        return np.array(rows).reshape(-1, width)


def add_values(running: Sequence[RunningSum], columns: Sequence[str], values: Mapping[str, float]) -> list[RunningSum]:
    """Return the running sums with the figures of a round added."""
    return [one.plus(values.get(column, 0.0)) for one, column in zip(running, columns, strict=True)]


MAIN_LEARNER = "ftml"
"""The learner whose regret is kept."""


class Comparator(NamedTuple):
    """What a comparator would have lost: sum over the rounds 0..``as_of_round`` - 1.

    ``kind`` says what it is: ``closed_form``, the best fixed meta-parameters by algebra; ``hindsight``, an estimate of
    theirs from above; ``dynamic``, an estimate from above of each task's own best.
    ``standard_error`` is that of the cumulative loss, 0 when every round was evaluated; ``settled`` says whether the
    loss had stopped falling in the training of an estimate.
    """

    kind: str
    as_of_round: int
    cumulative_loss: float
    standard_error: float
    settled: bool = True


class Regret(NamedTuple):
    """sum_t f_t(U_t(w_t)) - comparator, over the first ``as_of_round`` rounds; below 0: ahead of it."""

    value: float
    standard_error: float
    as_of_round: int
    kind: str


class RegretLedger:
    """The cumulative loss of each learner after adaptation, scored before learning, and regret against others.

    regret_T(against) = sum_{t<T} f_t(U_t(w_t)) - L_T(against) (Finn et al., ICML 2019, eq. 2); baselines
    are compared at the newest round, other comparators at the round up to which they were evaluated.
    """

    def __init__(self, learners: Iterable[str], sums: RunningSums | None = None) -> None:
        """Go on where ``sums`` are, which have a column for each of the ``learners``, ``ftml`` among them.

        By default sums in memory begin before round 0: 8 bytes a round and learner.
        """
        self.learners = tuple(learners)
        if MAIN_LEARNER not in self.learners:
            raise ValueError(f"the ledger keeps the regret of {MAIN_LEARNER!r}: name it among {[*self.learners]}")
        self._sums: RunningSums = MemoryRunningSums(self.learners) if sums is None else sums
        self._column = {name: self._sums.columns.index(name) for name in self.learners}
        self._comparators: dict[str, Comparator] = {}

    def __len__(self) -> int:
        """How many rounds are recorded."""
        return len(self._sums)

    def record(self, losses: Mapping[str, float] | None, extra: Mapping[str, float] | None = None) -> None:
        """Record the next round: each learner's query loss after adaptation, before it learned the task.

        None stands for a round that was skipped: it adds nothing to anyone. Figures for other columns of the sums
        stand ``extra``.
        Raises ``ValueError`` when a learner is missing or unknown, or a loss is not finite.
        """
        if losses is None:
            losses = dict.fromkeys(self.learners, 0.0)
        if losses.keys() != set(self.learners):
            learners = sorted(self.learners)
            raise ValueError(f"round {len(self)} has losses of {sorted(losses)}; the learners are {learners}")
        if not all(map(math.isfinite, losses.values())):
            raise ValueError(
                f"round {len(self)} has losses {dict(losses)}: a round that is not finite is skipped, None"
            )
        self._sums.append({**losses, **(extra or {})})

    def compare(self, comparator: Comparator) -> None:
        """Take a newer evaluation of a comparator.

        Raises ``ValueError`` when it covers rounds that are not recorded.
        """
        if not 0 < comparator.as_of_round <= len(self):
            raise ValueError(f"a comparator as of round {comparator.as_of_round}; the ledger has {len(self)} rounds")
        self._comparators[comparator.kind] = comparator

    def cumulative_loss(self, learner: str, rounds: int | None = None) -> float:
        """Return a learner's loss summed over the first ``rounds`` rounds (all by default), in its loss's unit.

        Raises ``IndexError`` when there are not so many.
        """
        rounds = len(self) if rounds is None else rounds
        if not 0 <= rounds <= len(self):
            raise IndexError(f"the loss of the first {rounds} rounds was asked for; the ledger has {len(self)}")
        return float(self._sums.read([rounds])[0, self._column[learner]])

    def mean_loss(self, learner: str, last: int) -> float | None:
        """Return a learner's mean loss over the last ``last`` rounds, or over all there are; None without any."""
        count = min(last, len(self))
        if count <= 0:
            return None
        return (self.cumulative_loss(learner) - self.cumulative_loss(learner, len(self) - count)) / count

    def comparator(self, kind: str) -> Comparator | None:
        """Return the newest evaluation of a comparator."""
        return self._comparators.get(kind)

    def regret(self) -> dict[str, Regret]:
        """Return the regret against every comparator that has been evaluated and every baseline."""
        regrets = {kind: self.regret_against(comparator) for kind, comparator in self._comparators.items()}
        if len(self):
            for name in self.learners:
                if name != MAIN_LEARNER:
                    difference = self.cumulative_loss(MAIN_LEARNER) - self.cumulative_loss(name)
                    regrets[name] = Regret(difference, 0.0, len(self), "baseline")
        return regrets

    def regret_against(self, comparator: Comparator) -> Regret:
        """Return the regret against one evaluation of a comparator, at the round it was made for."""
        lost = self.cumulative_loss(MAIN_LEARNER, comparator.as_of_round)
        value = lost - comparator.cumulative_loss
        return Regret(value, comparator.standard_error, comparator.as_of_round, comparator.kind)
