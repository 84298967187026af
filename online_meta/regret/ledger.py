"""Keep the regret ledger: every learner's loss in each round, and the regret against every comparator."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from online_meta.regret.differences import Differences, Verdict, confidence_sequence, judge
from online_meta.regret.running_sums import MemoryRunningSums, RunningSums

MAIN_LEARNER = "ftml"
"""The learner that leads a ledger by default."""
LARGEST_LOSS = 1e100
"""A loss of a larger size counts as not finite, so that sums of losses and of their squares are finite."""
LOSS_CAP = 1000.0
"""What a loss that is not finite is charged at, by default."""
LEVEL_MARGIN = 0.01
"""The share of the other's mean loss within which two learners count as level, by default."""
MOST_WINDOWS = 4
"""The number of windows whose sums are kept."""
UNLEAKED = "without leaks: "
"""Prefix of the columns that leave out rounds whose query set may have been seen before."""


class Comparator(NamedTuple):
    """The cumulative loss of a comparator over the rounds ``first_round``..``as_of_round`` - 1.

    Attributes:
        kind: ``closed_form``: the best fixed meta-parameters in closed form; ``hindsight``: an estimate of their
            loss by training; ``dynamic``: an estimate of the loss of each task's own best parameters; ``bayes``: the
            exact Bayes predictor of the source.
        as_of_round: the number of rounds up to which it is evaluated.
        cumulative_loss: the sum of the query losses over these rounds, in nats or squared units of y.
        standard_error: the standard error of the cumulative loss, 0 if every round was evaluated.
        settled: whether the loss had stopped decreasing in the training of an estimate.
        first_round: the first round that it covers; later than 0 if retention has discarded what came before.
        evaluated: the number of rounds whose loss was computed, the others being estimated; None if it is not known.
        gradient_norm: of an estimate, the global norm of the mean meta-gradient where it ended, a certificate of how
            nearly stationary it is; None if it is not known.
    """

    kind: str
    as_of_round: int
    cumulative_loss: float
    standard_error: float
    settled: bool = True
    first_round: int = 0
    evaluated: int | None = None
    gradient_norm: float | None = None


class Regret(NamedTuple):
    """The regret sum_t f_t(U_t(w_t)) - the other's loss.

    Attributes:
        value: the regret; negative if the learner lost less than the other.
        standard_error: of the value. Against a baseline: sqrt(n) times the standard deviation of a round's difference.
        as_of_round: the number of rounds, skipped ones included, up to which it is computed.
        kind: that of the comparator, or "baseline" for another learner.
        rounds: the number n of rounds in which both have a loss.
        interval: against a baseline, a confidence sequence for the value, see ``confidence_sequence``; None without
            enough rounds.
        verdict: against a baseline, what the interval shows: "ahead", "behind", "level" or "too early".
        margin: the value up to which the two count as level.
        first_round: the first round of the regret.
    """

    value: float
    standard_error: float
    as_of_round: int
    kind: str
    rounds: int = 0
    interval: tuple[float, float] | None = None
    verdict: Verdict | None = None
    margin: float | None = None
    first_round: int = 0


class LossSummary(NamedTuple):
    """A learner's losses over some rounds: their sum, the rounds in which it has a loss, and how many were charged."""

    total: float
    rounds: int
    charged: int

    def mean(self) -> float | None:
        """Return the mean loss; None if there is no round."""
        return self.total / self.rounds if self.rounds else None


def is_finite_loss(loss: float | None) -> bool:
    """Return whether a loss counts as finite: it is a number of at most ``LARGEST_LOSS``."""
    return loss is not None and abs(loss) <= LARGEST_LOSS


def charge_for(losses: Iterable[float | None], loss_cap: float = LOSS_CAP) -> float:
    """Return what losses of a round that are not finite are charged at.

    It is ``loss_cap``, or the largest finite one of ``losses`` if that is higher, so that a learner never gains on
    another by a loss that is not finite.
    """
    return max([loss_cap, *(loss for loss in losses if loss is not None and is_finite_loss(loss))])


def rounds_column(learner: str) -> str:
    """Return the name of the column that counts the rounds in which a learner has a loss."""
    return f"rounds {learner}"


def charged_column(learner: str) -> str:
    """Return the name of the column that counts the rounds in which a learner's loss was not finite."""
    return f"charged {learner}"


def difference_columns(learner: str, pool: str | None = None) -> tuple[str, str, str]:
    """Return the columns of the paired differences from a learner: their number, sum and sum of squares.

    They are those of the leader's losses, or of the ``pool``'s.
    """
    of = "" if pool is None else f"{pool} "
    return f"{of}common {learner}", f"{of}difference {learner}", f"{of}squared difference {learner}"


def ledger_columns(learners: Iterable[str], leader: str = MAIN_LEARNER, pool: str | None = None) -> tuple[str, ...]:
    """Return the columns that a ledger of these learners, with this ``leader`` and this ``pool``, needs."""
    own: list[str] = []
    for name in learners:
        own += [name, rounds_column(name), charged_column(name)]
        own += difference_columns(name) if name != leader else ()
        own += difference_columns(name, pool) if pool not in (None, name) else ()
    return (*own, *(UNLEAKED + name for name in own))


class RegretLedger:
    """The record of each learner's loss after adaptation, scored before learning, and of the regret.

    regret_T(against) = sum_{t<T} f_t(U_t(w_t)) - L_T(against) (Finn et al., ICML 2019, eq. 2) is that of the
    learner that leads. The others are its baselines. They are compared
    at the newest round, over the rounds in which both have a loss; comparators at the round up to which they were
    evaluated.
    """

    def __init__(
        self,
        learners: Iterable[str],
        sums: RunningSums | None = None,
        *,
        leader: str = MAIN_LEARNER,
        pool: str | None = None,
        loss_cap: float = LOSS_CAP,
        level_margin: float = LEVEL_MARGIN,
    ) -> None:
        """Continue the ledger stored in ``sums``, or start an empty one in memory.

        Args:
            learners: the names of the learners; ``leader`` must be among them.
            sums: the running sums, with the columns of ``ledger_columns``; None for new sums in memory, which take some
                100 bytes per round and learner.
            leader: the name of the learner that leads: the regret is its losses'.
            pool: the name of the learner that mixes the answers of the others, which is compared with each of them,
                too; None if there is none.
            loss_cap: what a loss that is not finite is charged at; see ``charge_for``.
            level_margin: the share of the other's mean loss within which two learners count as level.

        Raises:
            ValueError: if ``leader`` or ``pool`` is not among the learners, or ``sums`` lacks a column.
        """
        self.learners = tuple(learners)
        self.leader, self.pool = leader, pool
        for needed in (leader, pool):
            if needed is not None and needed not in self.learners:
                raise ValueError(f"learners are {[*self.learners]}: the ledger needs {needed!r} among them")
        columns = ledger_columns(self.learners, leader, pool)
        self._sums: RunningSums = MemoryRunningSums(columns) if sums is None else sums
        self._column = {name: self._sums.columns.index(name) for name in columns}
        self._loss_cap, self._level_margin = loss_cap, level_margin
        self._comparators: dict[str, Comparator] = {}
        self._windows: dict[tuple[int, int], NDArray[np.float64]] = {}

    def __len__(self) -> int:
        """Return the number of recorded rounds."""
        return len(self._sums)

    def record(
        self,
        losses: Mapping[str, float | None] | None,
        extra: Mapping[str, float] | None = None,
        *,
        charge: float | None = None,
        leaked: bool = False,
    ) -> None:
        """Record the next round.

        Args:
            losses: each learner's query loss after adaptation, scored before it learned the task. One that is not
                finite is charged and counted. A learner that does not play has none. None for a round that counts for
                no learner.
            extra: values for other columns of the sums.
            charge: what a loss that is not finite is charged at; by default, ``charge_for`` of the losses.
            leaked: whether the query set may have been seen before, so that the round is also left out of the figures
                without leaks.

        Raises:
            ValueError: if a learner is unknown, or the leader or the pool is missing.
        """
        needed = {self.leader} if self.pool is None else {self.leader, self.pool}
        if losses is not None and not needed <= losses.keys() <= set(self.learners):
            learners = sorted(self.learners)
            raise ValueError(f"round {len(self)} has losses of {sorted(losses)}; the learners are {learners}")
        values: dict[str, float] = {}
        if losses:
            amount = charge_for(losses.values(), self._loss_cap) if charge is None else charge
            values = _round_values(losses, self.leader, self.pool, amount)
        unleaked = {} if leaked else {UNLEAKED + column: value for column, value in values.items()}
        self._sums.append({**values, **unleaked, **(extra or {})})

    def compare(self, comparator: Comparator) -> None:
        """Set the newest evaluation of a comparator.

        Raises ``ValueError`` if it covers rounds that are not recorded, or none.
        """
        if not 0 < comparator.as_of_round <= len(self):
            raise ValueError(f"comparator is as of round {comparator.as_of_round}; the ledger has {len(self)} rounds")
        self._comparators[comparator.kind] = comparator

    def summarise(self, learner: str, start: int = 0, end: int | None = None, *, leaks: bool = True) -> LossSummary:
        """Return a learner's losses over the rounds ``start`` .. ``end`` - 1, by default all.

        Args:
            learner: its name.
            start: the first round.
            end: one past the last round; None for all.
            leaks: whether rounds whose query set may have been seen before count.

        Raises:
            IndexError: if fewer rounds are recorded.
        """
        names = (learner, rounds_column(learner), charged_column(learner))
        total, rounds, charged = self._read(names, start, end, leaks)
        return LossSummary(total, int(rounds), int(charged))

    def _read(self, names: Iterable[str], start: int, end: int | None, leaks: bool) -> list[float]:
        end = len(self) if end is None else end
        if not 0 <= start <= end <= len(self):
            raise IndexError(f"rounds is {end}; the ledger has {len(self)} rounds")
        row = self._windows.get((start, end))
        if row is None:  # Sums of a window never change; the same few are read for every learner.
            row = self._sums.windows([start, end])[0]
            self._windows = {**dict([*self._windows.items()][-MOST_WINDOWS:]), (start, end): row}
        return [float(row[self._column[name if leaks else UNLEAKED + name]]) for name in names]

    def cumulative_loss(self, learner: str, rounds: int | None = None) -> float:
        """Return a learner's loss summed over the first ``rounds`` rounds (all by default), in units of the loss.

        Raises ``IndexError`` if fewer rounds are recorded.
        """
        return self.summarise(learner, 0, rounds).total

    def mean_loss(self, learner: str, last: int) -> float | None:
        """Return a learner's mean loss over the last ``last`` rounds, or over all if fewer; None if there are none."""
        return self.summarise(learner, max(len(self) - max(last, 0), 0)).mean()

    def comparator(self, kind: str) -> Comparator | None:
        """Return the newest evaluation of a comparator, or None."""
        return self._comparators.get(kind)

    def regret(self, *, leaks: bool = True) -> dict[str, Regret]:
        """Return the regret against every evaluated comparator and every baseline, by comparator kind or learner.

        Without ``leaks``, only that against baselines is known, over the other rounds.
        """
        kinds = self._comparators.items() if leaks else ()
        regrets = {kind: self.regret_against(comparator) for kind, comparator in kinds}
        if len(self):
            regrets |= {name: self._compare_with(name, leaks) for name in self.learners if name != self.leader}
        return regrets

    def differences(
        self, learner: str, rounds: int | None = None, *, leaks: bool = True, pool: str | None = None
    ) -> Differences:
        """Return the paired differences "leader minus ``learner``" over the first ``rounds`` rounds, or all.

        With the name of the ``pool``, they are "pool minus ``learner``".
        """
        count, total, squares = self._read(difference_columns(learner, pool), 0, rounds, leaks)
        return Differences(int(count), total, squares)

    def _compare_with(self, name: str, leaks: bool) -> Regret:
        differences = self.differences(name, leaks=leaks)
        mean = self.summarise(name, leaks=leaks).mean()
        margin = abs(mean or 0.0) * self._level_margin
        interval = confidence_sequence(differences)
        return Regret(
            value=differences.total,
            standard_error=differences.standard_error(),
            as_of_round=len(self),
            kind="baseline",
            rounds=differences.rounds,
            interval=interval and (interval[0] * differences.rounds, interval[1] * differences.rounds),
            verdict=judge(interval, margin),
            margin=margin * differences.rounds,
        )

    def regret_against(self, comparator: Comparator) -> Regret:
        """Return the regret against one evaluation of a comparator, over the rounds that it covers."""
        lost = self.summarise(self.leader, comparator.first_round, comparator.as_of_round)
        return Regret(
            value=lost.total - comparator.cumulative_loss,
            standard_error=comparator.standard_error,
            as_of_round=comparator.as_of_round,
            kind=comparator.kind,
            rounds=lost.rounds,
            first_round=comparator.first_round,
        )


def _round_values(losses: Mapping[str, float | None], leader: str, pool: str | None, charge: float) -> dict[str, float]:
    """Return the values of the ledger's columns in a round."""
    counted = {name: loss if loss is not None and is_finite_loss(loss) else charge for name, loss in losses.items()}
    values: dict[str, float] = {}
    for name, loss in counted.items():
        values |= {name: loss, rounds_column(name): 1.0, charged_column(name): float(not is_finite_loss(losses[name]))}
        for reference, columns in ((leader, difference_columns(name)), (pool, difference_columns(name, pool))):
            if reference not in (None, name):
                difference = counted[reference] - loss
                values |= dict(zip(columns, (1.0, difference, difference * difference), strict=True))
    return values
