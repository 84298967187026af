"""The regret ledger: losses of every learner over the rounds, and regret against every comparator."""

import math
from array import array
from collections.abc import Iterable, Mapping
from typing import NamedTuple

LEARNER = "ftml"
"""The learner whose regret is kept."""


class Comparator(NamedTuple):
    """What a comparator would have lost: sum over the rounds 0..``as_of_round`` - 1.

    ``kind`` says what it is (``hindsight``: an estimate, from above, of the best fixed meta-parameters);
    ``standard_error`` is that of the cumulative loss, 0 when every round was evaluated.
    """

    kind: str
    as_of_round: int
    cumulative_loss: float
    standard_error: float


class Regret(NamedTuple):
    """sum_t f_t(U_t(w_t)) - comparator, over the first ``as_of_round`` rounds; below 0: ahead of it."""

    value: float
    standard_error: float
    as_of_round: int
    kind: str


class RunningSum(NamedTuple):
    """A float sum with the rounding errors kept aside (Neumaier 1974).

    Its error is at most 1 ulp, plus n^2 * 2^-106 * sum |x_i| over n terms: 1 ulp over millions of losses of one sign.
    """

    total: float = 0.0
    lost: float = 0.0

    def plus(self, value: float) -> "RunningSum":
        """Return the sum with ``value`` added."""
        total = self.total + value
        big, small = (self.total, value) if abs(self.total) >= abs(value) else (value, self.total)
        return RunningSum(total, self.lost + ((big - total) + small))

    def value(self) -> float:
        """The sum."""
        return self.total + self.lost


class RegretLedger:
    """Keeps 8 bytes a round and learner: the cumulative loss after adaptation, scored before learning.

    regret_T(against) = sum_{t<T} f_t(U_t(w_t)) - L_T(against) (Finn et al., ICML 2019, eq. 2); baselines
    are compared at the newest round, other comparators at the round up to which they were evaluated.
    """

    def __init__(self, learners: Iterable[str]) -> None:
        """Begin before round 0 for the named ``learners``, ``ftml`` among them."""
        self._sums = {name: RunningSum() for name in learners}
        if LEARNER not in self._sums:
            raise ValueError(f"the ledger keeps the regret of {LEARNER!r}: name it among {list(self._sums)}")
        self._cumulative = {name: array("d") for name in self._sums}
        self._comparators: dict[str, Comparator] = {}

    def __len__(self) -> int:
        """How many rounds are recorded."""
        return len(self._cumulative[LEARNER])

    @property
    def learners(self) -> tuple[str, ...]:
        """The names of the learners."""
        return tuple(self._sums)

    def record(self, losses: Mapping[str, float] | None) -> None:
        """Record the next round: each learner's query loss after adaptation, before it learned the task.

        None stands for a round that was skipped: it adds nothing to anyone.
        Raises ``ValueError`` when a learner is missing or unknown, or a loss is not finite.
        """
        if losses is None:
            losses = dict.fromkeys(self._sums, 0.0)
        if losses.keys() != self._sums.keys():
            raise ValueError(f"round {len(self)} has losses of {sorted(losses)}; the learners are {sorted(self._sums)}")
        if not all(map(math.isfinite, losses.values())):
            raise ValueError(
                f"round {len(self)} has losses {dict(losses)}: a round that is not finite is skipped, None"
            )
        for name, loss in losses.items():
            self._sums[name] = self._sums[name].plus(loss)
            self._cumulative[name].append(self._sums[name].value())

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
        return self._cumulative[learner][rounds - 1] if rounds else 0.0

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
                if name != LEARNER:
                    ahead = self.cumulative_loss(LEARNER) - self.cumulative_loss(name)
                    regrets[name] = Regret(ahead, 0.0, len(self), "baseline")
        return regrets

    def regret_against(self, comparator: Comparator) -> Regret:
        """Return the regret against one evaluation of a comparator, at the round it was made for."""
        lost = self.cumulative_loss(LEARNER, comparator.as_of_round)
        value = lost - comparator.cumulative_loss
        return Regret(value, comparator.standard_error, comparator.as_of_round, comparator.kind)
