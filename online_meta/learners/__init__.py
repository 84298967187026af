"""Online learners: Follow-the-Meta-Leader and the baselines that run beside it, one a file."""

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from online_meta.inner import Inner
from online_meta.replay import ReplayPolicy
from online_meta.types import AccuracyFn, Engine, Meta, MetaGradient, Params, ReplayBuffer, Schedule, Task

FUNCTION = "build"
"""Each file offers ``build(context, **options) -> Learner``."""


class MemoryReplayBuffer:
    """Keeps every task of a stream in a list."""

    def __init__(self) -> None:
        """Begin with no round."""
        self._tasks: list[Task] = []

    def __getitem__(self, round: int, /) -> Task:
        """The task of that round."""
        return self._tasks[round]

    def available(self, count: int) -> Sequence[int]:
        """All of them."""
        return range(count)

    def distribute(self, shares: Sequence[Sequence[int]]) -> None:
        """They are all here."""

    def prefetch(self, reader: Hashable, rounds: Iterable[int]) -> None:
        """They are all here."""

    def add(self, round: int, task: Task) -> None:
        """Keep the task of a round; one that is played again, by a learner that went back, takes the old one's place.

        Raises ``IndexError`` when a round before it is missing.
        """
        if not 0 <= round <= len(self._tasks):
            raise IndexError(f"round {round} comes after round {len(self._tasks)}, which is missing")
        self._tasks[round : round + 1] = [task]


def gather_single_process(value: Any) -> list[Any]:
    """Gather ``value`` from a process that is alone."""
    return [value]


@dataclass(frozen=True)
class LearnerContext:
    """The common ground of the learners that play one stream.

    ``start`` are the initial meta-parameters; ``draw_weights(t)`` draws new random weights for round t;
    ``engine`` makes its own optimizer for meta-parameters; ``buffer`` holds the rounds' tasks; ``batching``, within
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
