"""What every learner of a run is made from, so that they differ in nothing but the algorithm."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path as Folder
from typing import Any

from online_meta.draws import Replay
from online_meta.inner import Inner
from online_meta.types import AccuracyFn, Engine, Meta, MetaGradient, Params, Past, Schedule


def keep_alone(value: Any) -> list[Any]:
    """Gather ``value`` from a process that is alone."""
    return [value]


@dataclass(frozen=True)
class LearnerSetup:
    """The common ground of the learners that play one stream.

    ``start`` are the initial meta-parameters; ``fresh(t)`` draws new random weights for round t;
    ``engine`` makes an optimizer of its own around meta-parameters; ``past`` holds the rounds' tasks; ``how``, within
    ``memory_limit`` bytes, meta-gradients are summed is for ``PathFinder``; compiled programs lie in ``programs``.
    ``schedule`` multiplies the learning rate of the engines. ``gather(value)`` returns on every rank, as JSON would
    give it back, what each rank called it with.
    """

    inner: Inner
    gradient: MetaGradient
    start: Meta
    fresh: Callable[[int], Params]
    engine: Callable[[Meta], Engine]
    replay: Replay
    batch: int
    steps_per_round: int
    seed: int
    past: Past
    accuracy: AccuracyFn | None
    schedule: Schedule | None = None
    programs: Folder | None = None
    how: str = "loop"
    memory_limit: int | None = None
    gather: Callable[[Any], list[Any]] = keep_alone
