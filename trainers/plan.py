"""What timing decided, written down before it is played and obeyed ever after."""

from pathlib import Path
from typing import NamedTuple

from trainers.json_lines import LineReader, LineWriter, find_line


class Plan(NamedTuple):
    """One meta-update: the ``rounds`` rounds from ``round`` on are scored with the same leader, then learned."""

    round: int
    rounds: int


class PlanBook:
    """The plans of a run in order, in a file beside the history; each is durable before it is played."""

    def __init__(self, path: Path, since: int = 0) -> None:
        """Open the book at ``path``, creating it if need be, for the rounds ``since`` that one on."""
        position = find_line(path, lambda line: bool(line["round"] >= since))
        self._writer = LineWriter(path, position)
        self._since = since
        self._plans = {plan.round: plan for plan in read_plans(path, position)}

    def decide(self, round: int, available: int, most: int) -> Plan:
        """Return the plan of ``round``: the one in the book, or a new one for what is ``available`` now.

        A new plan shares one update among all ``available`` rounds, ``most`` at the most.
        """
        if round not in self._plans:
            plan = Plan(round, max(1, min(available, most)))
            self._writer.append(plan._asdict())
            self._writer.sync()
            return plan
        return self._plans.pop(round)

    @property
    def planned(self) -> int:
        """Up to which round there are plans."""
        return max((plan.round + plan.rounds for plan in self._plans.values()), default=self._since)

    def close(self) -> None:
        """Close the file."""
        self._writer.close()


def read_plans(path: Path, position: int = 0) -> list[Plan]:
    """Return the plans in the file at ``path`` from a ``position`` in bytes on; none when there is no file."""
    return [Plan(line["round"], line["rounds"]) for line in LineReader(path, position).lines()]
