"""Where a rank's time goes: how long it works itself, and how long it waits in collectives for the others."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

from trainers.crew import Crew

P = ParamSpec("P")
T = TypeVar("T")


@dataclass
class Timing:
    """What a rank has done since it began: meta-steps, seconds on them without waiting, seconds in collectives."""

    steps: int = 0
    step_seconds: float = 0.0
    waiting_seconds: float = 0.0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time of the block as waiting for other ranks."""
        began = time.monotonic()
        try:
            yield
        finally:
            self.waiting_seconds += time.monotonic() - began

    @contextmanager
    def working(self) -> Iterator[None]:
        """Count the time of the block as work, but for what of it is waiting."""
        began, waited = time.monotonic(), self.waiting_seconds
        try:
            yield
        finally:
            self.step_seconds += time.monotonic() - began - (self.waiting_seconds - waited)


def timed(crew: Crew, timing: Timing) -> Crew:
    """Return a crew whose collectives are counted as waiting; a process that is alone waits for nobody."""
    if crew.world == 1:
        return crew

    def counted(call: Callable[P, T]) -> Callable[P, T]:
        def collective(*args: P.args, **kwargs: P.kwargs) -> T:
            with timing.waiting():
                return call(*args, **kwargs)

        return collective

    return crew._replace(
        share=counted(crew.share),
        share_tensors=counted(crew.share_tensors),
        send=counted(crew.send),
        gather=counted(crew.gather),
    )
