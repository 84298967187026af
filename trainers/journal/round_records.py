"""Make the record (JSON line) of a round, and compare it with the one that an earlier process wrote."""

import math
from collections.abc import Iterator, Mapping, Sequence
from hashlib import blake2b
from typing import NamedTuple, Protocol

import numpy as np
from torch import Tensor

from online_meta.functional.recording import flatten
from online_meta.learners.pool import PoolFigures
from online_meta.regret.ledger import LOSS_CAP, charge_for, is_finite_loss
from online_meta.regret.scoring import points_needed
from online_meta.types import Batch, Learned, Score, StepReport, Task
from streams.entities import find_entity
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


class TaskContent(NamedTuple):
    """What identifies the content of a task, whatever its id.

    Attributes:
        digest: 32 hexadecimal digits; equal for the same samples in any order, of the support and of the query set.
        overlap: the number of query samples that are support samples, too, with equal x and y.
    """

    digest: str
    overlap: int


def read_content(task: Task) -> TaskContent:
    """Return the digest of a task's samples, and how many its support and query set share."""
    support, query = (_sample_digests(batch) for batch in task)
    found = blake2b(b"".join(sorted(support)), digest_size=16)
    found.update(b"query" + b"".join(sorted(query)))
    known = set(support)
    return TaskContent(found.hexdigest(), sum(sample in known for sample in query))


def _sample_digests(batch: Batch) -> list[bytes]:
    leaves: list[Tensor] = []
    flatten(batch, leaves)
    parts = [part.detach().cpu().contiguous().numpy() for part in leaves]
    layout = "".join(f"{part.dtype}{part.shape[1:]}" for part in parts).encode()
    if not len(parts[0]):
        return []
    rows = np.concatenate([part.reshape(len(part), -1).view(np.uint8) for part in parts], axis=1)
    width, data = rows.shape[1], rows.tobytes()
    samples = (layout + data[first : first + width] for first in range(0, len(data), width))
    return [blake2b(sample, digest_size=16).digest() for sample in samples]


SECONDS_SPENT = "seconds_by_learner"
"""The key under which a round's record has the seconds in which each learner scored and learned."""


LEADING_KEYS = ("loss_before", "loss_after", "accuracy", "charged")
"""What a round's record says of the first learner at its top level, too."""


def make_round_records(
    entries: Sequence[HistoryEntry],
    scores: Mapping[str, Sequence[Score]],
    learned: Learned,
    seconds: float,
    support: SupportSizes | None = None,
    idle_steps: Sequence[StepReport] = (),
    contents: Sequence[TaskContent] | None = None,
    loss_cap: float = LOSS_CAP,
    spent: Mapping[str, float] | None = None,
    pool: Sequence[PoolFigures] = (),
) -> list[Line]:
    """Return the records of the rounds of one update.

    The last record contains the meta-steps of the update. Each learner has its own result: a loss that is not finite is
    null, and ``charged`` is what it counts as, so that a learner that fails voids no round for the others.

    Args:
        entries: of the rounds in the history.
        scores: of each learner, one per round; the first learner leads.
        learned: result of the leading learner's update.
        seconds: duration of the update, which is divided evenly among the rounds.
        support: if prefixes of the support sets were scored, their sizes.
        idle_steps: meta-steps on past rounds before the update; the first record contains them.
        contents: of the rounds' tasks.
        loss_cap: what a loss that is not finite is charged at; see ``charge_for``.
        spent: seconds in which each learner scored and learned, which are divided evenly among the rounds.
        pool: the pool's figures of each round; empty without a pool.
    """
    lines, leader = [], next(iter(scores))
    for index, entry in enumerate(entries):
        own = {name: all_scores[index] for name, all_scores in scores.items()}
        last = index == len(entries) - 1
        learners = {name: score_to_json(score, find_charge(own, loss_cap)) for name, score in own.items()}
        lines.append(
            {
                **_describe_entry(entry),
                **{key: value for key, value in learners[leader].items() if key in LEADING_KEYS},
                "replayed": len(learned.replayed) if last else 0,
                "seconds": round(seconds / len(entries), 6),
                "skipped": None,
                "learners": learners,
                "steps": [_step_to_json(step.norm, step.skipped) for step in learned.steps] if last else [],
            }
        )
        if contents is not None:
            lines[-1] |= {"content": contents[index].digest, "overlap": contents[index].overlap}
        if spent is not None:
            lines[-1][SECONDS_SPENT] = {name: round(seconds / len(entries), 6) for name, seconds in spent.items()}
        if pool:
            lines[-1]["pool"] = pool[index]._asdict()
        if idle_steps and index == 0:
            lines[-1]["more_steps"] = [_step_to_json(step.norm, step.skipped) for step in idle_steps]
        if support is not None:
            size = support.sizes[index]
            reached = {name: _efficiency_to_json(score, size, support.proficiency) for name, score in own.items()}
            lines[-1]["efficiency"] = reached
    return lines


def make_quarantine_record(entry: HistoryEntry, quarantine: Quarantine, idle_steps: Sequence[StepReport] = ()) -> Line:
    """Return the record of a round that no learner scores or learns.

    Args:
        entry: of the round in the history.
        quarantine: why the round is quarantined.
        idle_steps: meta-steps on past rounds before it.
    """
    line: Line = {
        **_describe_entry(entry),
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


def _describe_entry(entry: HistoryEntry) -> Line:
    """Return what a record says of the round's task: its id, its source, and the entity if the id names one."""
    entity = find_entity(entry.id)
    named = {} if entity is None else {"entity": entity}
    return {"round": entry.round, "id": entry.id, "source": entry.source, **named}


def find_difference(before: Line, now: Line) -> str | None:
    """Return the first difference between two records of the same round as text; None if they are equal.

    Args:
        before: record of an earlier process.
        now: record of this process.
    """
    keys = ["id", "loss_before", "loss_after", "accuracy", "skipped", "learners", "pool", "steps", "more_steps"]
    if before["skipped"] == "not_finite":  # 0.1.0 kept no learner's result of a round in which one was not finite.
        keys = ["id", "steps", "more_steps"]
    if "content" in before:
        keys += ["content", "overlap"]
    before, now = ({**line, "learners": results} for line, results in _align_results(before, now))
    for key in keys:
        if key == "pool" and key not in before:  # Versions before the pool recorded none.
            continue
        if before.get(key) != now.get(key):
            return f"{key} was {before.get(key)!r} and is {now.get(key)!r}"
    return None


CHANGED_ANSWERS = ("from_scratch", "dp_mixture")
"""Learners that answer otherwise than in 0.1.0, whose lines have no content."""


def _align_results(before: Line, now: Line) -> Iterator[tuple[Line, Line]]:
    """Yield both lines, each with the learners' results that can be compared: another version may record less."""
    left_out = () if "content" in before else CHANGED_ANSWERS
    old, new = before["learners"], now["learners"]
    kept = {name: old[name] for name in old if name not in left_out}
    yield before, kept
    yield now, {name: {key: new.get(name, {}).get(key) for key in result} for name, result in kept.items()}


def list_steps(line: Line) -> list[Line]:
    """Return the meta-steps in the record of a round; those on past rounds before it come first."""
    return [*line.get("more_steps", ()), *line["steps"]]


def find_charge(scores: Mapping[str, Score], loss_cap: float = LOSS_CAP) -> float:
    """Return what losses of a round that are not finite are charged at, from the scores of all answers by name."""
    return charge_for((loss for score in scores.values() for loss in _losses(score)), loss_cap)


def charge_losses(scores: Mapping[str, Score], loss_cap: float = LOSS_CAP) -> dict[str, float]:
    """Return what a round counts for each answer by name: its loss, or ``find_charge`` if that is not finite."""
    charge = find_charge(scores, loss_cap)
    losses = {name: score.loss_after for name, score in scores.items()}
    return {name: loss if is_finite_loss(loss) else charge for name, loss in losses.items()}


def _losses(score: Score) -> tuple[float, ...]:
    return (score.loss_before, score.loss_after, *(prefix.loss for prefix in score.prefixes))


def score_to_json(score: Score, charge: float) -> Line:
    """Return a learner's part of a round's line.

    Args:
        score: of the learner.
        charge: what counts in place of a loss that is not finite.
    """
    losses = {"loss_before": _finite_or_none(score.loss_before), "loss_after": _finite_or_none(score.loss_after)}
    charged = {} if all(map(is_finite_loss, _losses(score))) else {"charged": charge}
    return {**losses, "accuracy": score.accuracy, **charged, **_distribution_to_json(score)}


def _distribution_to_json(score: Score) -> Line:
    """Return the figures of a predicted distribution; none for an outcome that is no distribution."""
    found: Line = {} if score.nll is None else {"nll": _finite_or_none(score.nll)}
    if score.sharpness is not None:
        found["sharpness"] = _finite_or_none(score.sharpness)
    if score.calibration is not None:
        found["calibration"] = {key: [*value] for key, value in score.calibration._asdict().items() if value}
    return found


def _finite_or_none(loss: float) -> float | None:
    return loss if is_finite_loss(loss) else None


def _efficiency_to_json(score: Score, size: int, proficiency: float | None) -> Line:
    prefixes = [(one.points, _finite_or_none(one.loss), one.accuracy) for one in score.prefixes]
    needed = None if proficiency is None else points_needed(score, size, proficiency)
    return {"prefixes": prefixes, "points_needed": needed}


def _step_to_json(norm: float, skipped: str | None) -> Line:
    return {"norm": norm if math.isfinite(norm) else None, "skipped": skipped}
