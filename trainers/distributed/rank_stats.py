"""Where a rank's time goes: how long it works itself, and how long it waits in collectives for the others."""

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
    """What a rank has done since it began: meta-steps, seconds on them without waiting, seconds in collectives."""

    steps: int = 0
    step_seconds: float = 0.0
    waiting_seconds: float = 0.0

    @contextmanager
    def measure_waiting(self) -> Iterator[None]:
        """Count the time of the block as waiting for other ranks."""
        start_time = time.monotonic()
        try:
            yield
        finally:
            self.waiting_seconds += time.monotonic() - start_time

    @contextmanager
    def measure_work(self) -> Iterator[None]:
        """Count the time of the block as work, but for what of it is waiting."""
        start_time, waited = time.monotonic(), self.waiting_seconds
        try:
            yield
        finally:
            self.step_seconds += time.monotonic() - start_time - (self.waiting_seconds - waited)


def measure_collectives(rank_group: RankGroup, rank_stats: RankStats) -> RankGroup:
    """Return a crew whose collectives are counted as waiting; a process that is alone waits for nobody."""
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
