"""What every learner of a run is made from, so that they differ in nothing but the algorithm."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from online_meta.draws import ReplayPolicy
from online_meta.inner import Inner
from online_meta.types import AccuracyFn, Engine, Meta, MetaGradient, Params, ReplayBuffer, Schedule


def gather_single_process(value: Any) -> list[Any]:
    """Gather ``value`` from a process that is alone."""
    return [value]


@dataclass(frozen=True)
class LearnerContext:
    """The common ground of the learners that play one stream.

    ``start`` are the initial meta-parameters; ``draw_weights(t)`` draws new random weights for round t;
    ``engine`` makes an optimizer of its own around meta-parameters; ``buffer`` holds the rounds' tasks; ``batching``, within
    ``memory_limit`` bytes, meta-gradients are summed is for ``Autotuner``; compiled programs lie in ``programs``.
    ``schedule`` multiplies the learning rate of the engines. ``gather(value)`` returns on every rank, as JSON would
    give it back, what each rank called it with.
    """

    inner: Inner
    gradient: MetaGradient
    start: Meta
    draw_weights: Callable[[int], Params]
    engine: Callable[[Meta], Engine]
    replay: ReplayPolicy
    batch: int
    steps_per_round: int
    seed: int
    buffer: ReplayBuffer
    accuracy: AccuracyFn | None
    schedule: Schedule | None = None
    programs: Path | None = None
    batching: str = "loop"
    memory_limit: int | None = None
    gather: Callable[[Any], list[Any]] = gather_single_process
