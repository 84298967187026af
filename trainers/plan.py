"""What timing decided, written down before it is played and obeyed ever after."""

from collections import Counter
from pathlib import Path
from typing import NamedTuple

from trainers.json_lines import LineReader, LineWriter, find_line


class UpdatePlan(NamedTuple):
    """One meta-update: the ``rounds`` rounds from ``round`` on are scored with the same leader, then learned.

    Of no rounds, it is one on past rounds alone, before ``round`` is there.
    """

    round: int
    rounds: int


class UpdateLog:
    """The plans of a run in order, in a file beside the history; each is durable before it is played."""

    def __init__(self, path: Path, first_round: int = 0) -> None:
        """Open the book at ``path``, creating it if need be, for the rounds ``first_round`` that one on."""
        position = find_line(path, lambda line: bool(line["round"] >= first_round))
        self._writer = LineWriter(path, position)
        self._first_round = first_round
        plans = read_plans(path, position)
        self._plans = {plan.round: plan for plan in plans if plan.rounds}
        self._idle_updates = Counter(plan.round for plan in plans if not plan.rounds)

    def choose_rounds(self, round: int, available: int, max_rounds: int) -> UpdatePlan:
        """Return the plan of ``round``: the one in the book, or a new one for what is ``available`` now.

        A new plan shares one update among all ``available`` rounds, ``max_rounds`` at the most.
        """
        if round not in self._plans:
            plan = UpdatePlan(round, max(1, min(available, max_rounds)))
            self._write(plan)
            return plan
        return self._plans.pop(round)

    def add_idle_update(self, round: int) -> None:
        """Write down that one more update on past rounds is made before ``round``."""
        self._write(UpdatePlan(round, 0))
        self._idle_updates[round] += 1

    def idle_updates(self, round: int) -> int:
        """Return how many updates on past rounds are made before ``round``."""
        return self._idle_updates[round]

    def is_planned(self, round: int) -> bool:
        """Return whether ``round`` is planned: what comes before it can't be changed any more."""
        return round < self.end

    def _write(self, plan: UpdatePlan) -> None:
        self._writer.append(plan._asdict())
        self._writer.sync()

    @property
    def end(self) -> int:
        """Up to which round there are plans."""
        return max((plan.round + plan.rounds for plan in self._plans.values()), default=self._first_round)

    def close(self) -> None:
        """Close the file."""
        self._writer.close()


def read_plans(path: Path, position: int = 0) -> list[UpdatePlan]:
    """Return the plans in the file at ``path`` from a ``position`` in bytes on; none when there is no file."""
    return [UpdatePlan(line["round"], line["rounds"]) for line in LineReader(path, position).lines()]
