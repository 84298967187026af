"""Make the record (JSON line) of a round, and compare it with the one that an earlier process wrote."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

from online_meta.regret.ledger import MAIN_LEARNER
from online_meta.regret.scoring import points_needed
from online_meta.types import Learned, Score, StepReport
from trainers.journal.jsonl import Line
from trainers.journal.quarantine import QUARANTINED, Quarantine


class HistoryEntry(Protocol):
    """A round in the history."""

    @property
    def round(self) -> int:
        """The number of the round."""

    @property
    def id(self) -> str:
        """The id of its task."""

    @property
    def source(self) -> str:
        """The source of its task."""


class SupportSizes(NamedTuple):
    """The sizes of the support sets of some rounds, and the ``proficiency`` to reach with their prefixes."""

    sizes: Sequence[int]
    proficiency: float | None = None


def make_round_records(
    entries: Sequence[HistoryEntry],
    scores: Mapping[str, Sequence[Score]],
    learned: Learned,
    seconds: float,
    support: SupportSizes | None = None,
    idle_steps: Sequence[StepReport] = (),
) -> list[Line]:
    """Return the records of the rounds of one update.

    The last record contains the meta-steps of the update. A round in which any learner's score is not finite is
    ``skipped``: it has no losses, so that all learners are summed over the same rounds.

    Args:
        entries: of the rounds in the history.
        scores: of each learner, one per round.
        learned: result of the leader's update.
        seconds: duration of the update, which is divided evenly among the rounds.
        support: if prefixes of the support sets were scored, their sizes.
        idle_steps: meta-steps on past rounds before the update; the first record contains them.
    """
    lines = []
    for index, entry in enumerate(entries):
        own = {name: all_scores[index] for name, all_scores in scores.items()}
        last = index == len(entries) - 1
        skipped = None if all(_is_finite(score) for score in own.values()) else "not_finite"
        leader_score = own[MAIN_LEARNER]
        lines.append(
            {
                "round": entry.round,
                "id": entry.id,
                "source": entry.source,
                "loss_before": None if skipped else leader_score.loss_before,
                "loss_after": None if skipped else leader_score.loss_after,
                "accuracy": None if skipped else leader_score.accuracy,
                "replayed": len(learned.replayed) if last else 0,
                "seconds": round(seconds / len(entries), 6),
                "skipped": skipped,
                "learners": {} if skipped else {name: _losses_to_json(score) for name, score in own.items()},
                "steps": [_step_to_json(step.norm, step.skipped) for step in learned.steps] if last else [],
            }
        )
        if idle_steps and index == 0:
            lines[-1]["more_steps"] = [_step_to_json(step.norm, step.skipped) for step in idle_steps]
        if support is not None and not skipped:
            size = support.sizes[index]
            lines[-1]["efficiency"] = {
                n: _efficiency_to_json(score, size, support.proficiency) for n, score in own.items()
            }
    return lines


def make_quarantine_record(entry: HistoryEntry, quarantine: Quarantine, idle_steps: Sequence[StepReport] = ()) -> Line:
    """Return the record of a round that no learner scores or learns.

    Args:
        entry: of the round in the history.
        quarantine: why the round is quarantined.
        idle_steps: meta-steps on past rounds before it.
    """
    line: Line = {
        "round": entry.round,
        "id": entry.id,
        "source": entry.source,
        "loss_before": None,
        "loss_after": None,
        "accuracy": None,
        "replayed": 0,
        "seconds": 0.0,
        "skipped": QUARANTINED,
        "learners": {},
        "steps": [],
        "quarantine": {"reason": quarantine.reason, "detail": quarantine.detail},
    }
    if idle_steps:
        line["more_steps"] = [_step_to_json(step.norm, step.skipped) for step in idle_steps]
    return line


def find_difference(before: Line, now: Line) -> str | None:
    """Return the first difference between two records of the same round as text; None if they are equal.

    Args:
        before: record of an earlier process.
        now: record of this process.
    """
    for key in ("id", "loss_before", "loss_after", "accuracy", "skipped", "learners", "steps"):
        if before[key] != now[key]:
            return f"{key} was {before[key]!r} and is {now[key]!r}"
    if before.get("more_steps") != now.get("more_steps"):
        return f"more_steps was {before.get('more_steps')!r} and is {now.get('more_steps')!r}"
    return None


def list_steps(line: Line) -> list[Line]:
    """Return the meta-steps in the record of a round; those on past rounds before it come first."""
    return [*line.get("more_steps", ()), *line["steps"]]


def _is_finite(score: Score) -> bool:
    return math.isfinite(score.loss_before) and math.isfinite(score.loss_after)


def _losses_to_json(score: Score) -> Line:
    return {"loss_before": score.loss_before, "loss_after": score.loss_after, "accuracy": score.accuracy}


def _efficiency_to_json(score: Score, size: int, proficiency: float | None) -> Line:
    prefixes = [(one.points, one.loss if math.isfinite(one.loss) else None, one.accuracy) for one in score.prefixes]
    needed = None if proficiency is None else points_needed(score, size, proficiency)
    return {"prefixes": prefixes, "points_needed": needed}


def _step_to_json(norm: float, skipped: str | None) -> Line:
    return {"norm": norm if math.isfinite(norm) else None, "skipped": skipped}
