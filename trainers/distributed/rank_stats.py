"""Measure a rank's time: its own work, and the time it waits for other ranks in collectives."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

from trainers.distributed.ranks import RankGroup

P = ParamSpec("P")
T = TypeVar("T")


@dataclass
class RankStats:
    """Counters of a rank since its start.

    Attributes:
        steps: meta-steps.
        step_seconds: seconds in meta-steps, without waiting.
        waiting_seconds: seconds in collectives.
    """

    steps: int = 0
    step_seconds: float = 0.0
    waiting_seconds: float = 0.0

    @contextmanager
    def measure_waiting(self) -> Iterator[None]:
        """Count the duration of the block as waiting for other ranks."""
        start_time = time.monotonic()
        try:
            yield
        finally:
            self.waiting_seconds += time.monotonic() - start_time

    @contextmanager
    def measure_work(self) -> Iterator[None]:
        """Count the duration of the block, without the waiting in it, as work."""
        start_time, waited = time.monotonic(), self.waiting_seconds
        try:
            yield
        finally:
            self.step_seconds += time.monotonic() - start_time - (self.waiting_seconds - waited)


def measure_collectives(rank_group: RankGroup, rank_stats: RankStats) -> RankGroup:
    """Return the rank group with collectives whose duration counts as waiting.

    Args:
        rank_group: returned unchanged if it has one process only.
        rank_stats: counts the waiting.
    """
    if rank_group.world == 1:
        return rank_group

    def measured(call: Callable[P, T]) -> Callable[P, T]:
        def collective(*args: P.args, **kwargs: P.kwargs) -> T:
            with rank_stats.measure_waiting():
                return call(*args, **kwargs)

        return collective

    return rank_group._replace(
        broadcast=measured(rank_group.broadcast),
        broadcast_tensors=measured(rank_group.broadcast_tensors),
        send=measured(rank_group.send),
        gather=measured(rank_group.gather),
    )
