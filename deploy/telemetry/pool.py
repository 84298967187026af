"""The pool's weights and regret and what each learner costs, over any rounds, and the verdict that follows."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from online_meta.regret.ledger import RegretLedger
from online_meta.regret.verdict import MetaLearningVerdict, PlayingAnswer, give_verdict, learner_of
from trainers.journal.jsonl import Line
from trainers.journal.round_records import SECONDS_SPENT

POOLED_ROUNDS, TIMED_ROUNDS = "pooled rounds", "timed rounds"
POOL_REGRET, POOL_BOUND, UNCLIPPED_REGRET = "pool regret", "pool bound", "unclipped pool regret"
"""The values after a round, not sums: the row of one round has them."""


class PoolSums(NamedTuple):
    """The columns of the pool and of the learners' costs in the running sums.

    Attributes:
        answers: the names of all answers, the leading learner's first.
        pool: the name of the pool; None if there is none.
        meta_learns: whether each learner does; one that is not named does.
    """

    answers: Sequence[str]
    pool: str | None = None
    meta_learns: Mapping[str, bool] = {}

    def learners(self) -> list[str]:
        """Return the names of the learners."""
        return [*dict.fromkeys(learner_of(answer) for answer in self.answers)]

    def experts(self) -> list[str]:
        """Return the names of the answers that may have weight: all but the pool's own."""
        return [name for name in self.answers if name != self.pool]

    def columns(self) -> list[str]:
        """Return the names of the columns."""
        costs = [TIMED_ROUNDS, *(_seconds(name) for name in self.learners())]
        if self.pool is None:
            return costs
        return [*costs, POOLED_ROUNDS, POOL_REGRET, POOL_BOUND, UNCLIPPED_REGRET, *map(weight_column, self.experts())]

    def figures(self, line: Line) -> dict[str, float]:
        """Return the value that a round adds to each column.

        Args:
            line: of the round in ``rounds.jsonl``.
        """
        figures: dict[str, float] = {}
        spent, pooled = line.get(SECONDS_SPENT), line.get("pool")
        if spent:
            figures |= {TIMED_ROUNDS: 1.0, **{_seconds(name): spent.get(name, 0.0) for name in self.learners()}}
        if pooled and self.pool is not None:
            figures |= {POOLED_ROUNDS: 1.0, POOL_REGRET: pooled["regret"], POOL_BOUND: pooled["bound"]}
            figures[UNCLIPPED_REGRET] = pooled["unclipped_regret"]
            figures |= {
                weight_column(name): weight for name, weight in pooled["weights"].items() if name in self.answers
            }
        return figures

    def weights(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Return each expert's mean share of the pool's weight; {} without a pool, and before its first round.

        An answer that never had weight, as of a learner that only plays in the shadow, is no expert.

        Args:
            sums: of each column over some rounds.
        """
        rounds = sums.get(POOLED_ROUNDS)
        if not rounds:
            return {}
        shares = {name: sums[weight_column(name)] for name in self.experts()}
        return {name: share / rounds for name, share in shares.items() if share}

    def seconds(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Return each learner's mean seconds of a round, of scoring and of learning; {} if they are not known.

        Args:
            sums: of each column over some rounds.
        """
        rounds = sums[TIMED_ROUNDS]
        return {name: sums[_seconds(name)] / rounds for name in self.learners()} if rounds else {}

    def judge(self, ledger: RegretLedger, last: Mapping[str, float], level_margin: float) -> MetaLearningVerdict:
        """Return whether meta-learning pays: of the pool, or of the leader where there is no pool.

        Args:
            ledger: of all rounds.
            last: the sum of each column over the last 100 rounds.
            level_margin: the share of the other's mean loss within which two count as level.
        """
        reference, weights = self.pool or ledger.leader, self.weights(last)
        answers = [
            PlayingAnswer(
                name,
                self.meta_learns.get(learner_of(name), True),
                ledger.differences(name, pool=self.pool),
                ledger.summarise(name).mean() or 0.0,
                weights.get(name),
            )
            for name in self.answers
            if name != reference
        ]
        return give_verdict(
            answers,
            reference,
            level_margin,
            leader=ledger.leader,
            leader_meta_learns=self.meta_learns.get(learner_of(ledger.leader), True),
            seconds_per_round=self.seconds(last),
        )


def verdict_to_json(verdict: MetaLearningVerdict) -> dict[str, Any]:
    """Return a verdict as the API and the report give it."""
    return {**verdict._asdict(), "can_be_switched_off": [one._asdict() for one in verdict.can_be_switched_off]}


def weight_column(expert: str) -> str:
    """Return the name of the column that sums an expert's shares of the weight."""
    return f"weight {expert}"


def _seconds(learner: str) -> str:
    return f"seconds {learner}"
