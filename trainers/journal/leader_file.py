"""The file that publishes what the run answers from: the state of a learner, and the rounds it has learned."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from safetensors import safe_open
from safetensors.torch import save

from online_meta.meta_optimizer import copy_to_cpu
from online_meta.regret.ledger import MAIN_LEARNER
from online_meta.types import State
from trainers.learner_settings import Decision

DECISIONS = "decisions"
"""The key of the metadata with the decisions of a race."""

RANGES = "inputs"
"""The key of the metadata with the ranges of the inputs of all rounds."""


class Published(NamedTuple):
    """The published leader.

    Attributes:
        rounds: number of rounds that it has learned; -1 if none is published.
        idle_updates: number of its updates on past rounds since.
        at: time of publication on the monotonic clock, in seconds; 0 if unknown.
    """

    rounds: int
    idle_updates: int
    at: float


def read_published_leader(leader: Path, learner: str = MAIN_LEARNER) -> Published:
    """Return what is known of the published leader: nothing if the file is of another learner.

    With it, rounds that are played again after a kill are not published again, so that the published leader never gets
    older.

    Args:
        leader: path of the file.
        learner: the name of the learner that answers.
    """
    if not leader.exists():
        return Published(-1, 0, 0.0)
    with safe_open(leader, "pt") as file:
        metadata = file.metadata()
        if metadata.get("learner", MAIN_LEARNER) != learner:
            return Published(-1, 0, 0.0)
        return Published(int(metadata["round"]), int(metadata.get("updates", 0)), 0.0)


def encode_leader(
    state: State,
    rounds: int,
    idle_updates: int = 0,
    learner: str = MAIN_LEARNER,
    leads: str | None = None,
    decisions: Sequence[Decision] = (),
    ranges: str = "",
) -> bytes:
    """Return the state of a learner as the bytes of a safetensors file.

    Of meta-parameters, weights have their names; the inner rule's parameters have the prefix ``rule.``. The metadata
    contain the round, the name of the learner and, if there are any, the idle updates. A pool has the state of each
    learner NAME under names that begin with "NAME/".

    Args:
        state: to encode.
        rounds: number of rounds learned.
        idle_updates: number of updates on past rounds since.
        learner: its name.
        leads: the name of the learner that leads; None if it is ``learner``.
        decisions: those of the run's race that hold; the metadata contain them as JSON, if there are any.
        ranges: of the inputs of its rounds, from ``encode_ranges``; the metadata contain them, unless they are "".
    """
    plain = {name: copy_to_cpu(value).contiguous() for name, value in state.items()}  # They may share memory.
    metadata = {"round": str(rounds), "learner": learner} | ({"updates": str(idle_updates)} if idle_updates else {})
    metadata |= {"leads": leads} if leads not in (None, learner) else {}
    if decisions:
        metadata[DECISIONS] = json.dumps([decision._asdict() for decision in decisions])
    if ranges:
        metadata[RANGES] = ranges
    return save(plain, metadata=metadata)
