"""Prepare a contestant for a race: call it once, and compare its result with the reference."""

import math
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from online_meta.batching.autotune import relative_error
from online_meta.types import MetaGrad, Params, Task
from tests.benchmarks.contestants import CONTESTANTS
from tests.benchmarks.works import Work

TURN_SECONDS = 0.05
LONG_SECONDS = 1.0


@dataclass
class Racer:
    """A prepared contestant.

    Attributes:
        name: the name in the table.
        turn: maps a number of calls to the mean seconds of a call.
        call: the function itself; None if another process runs it.
        found: the computed meta-gradient.
        first: seconds of the first call.
        compiling: seconds of compiling, if known.
        bytes: the memory of a call, if another process runs it.
        error: the error relative to a float64 reference.
        calls: the number of calls per turn.
        turns: the seconds of the turns so far.
    """

    name: str
    turn: Callable[[int], float]
    call: Callable[[], MetaGrad] | None
    found: MetaGrad
    first: float
    compiling: float | None = None
    bytes: int | None = None
    error: float = math.inf
    calls: int = 1
    turns: list[float] = field(default_factory=list)

    def calibrate(self, right: MetaGrad) -> None:
        """Compute the error, and choose a number of calls per turn that is long enough to time."""
        self.error = relative_error(self.found, right)
        if self.first - (self.compiling or 0.0) > LONG_SECONDS and not self.compiles:
            return
        self.turn(1)  # The second call may still be slow.
        self.calls = max(1, min(200, math.ceil(TURN_SECONDS / max(self.turn(1), 1e-6))))

    @property
    def compiles(self) -> bool:
        """Whether the first call prepares a program for the others."""
        return self.name.endswith(("compiled", "traced"))


def start_racer(name: str, work: Work, weights: Params, tasks: list[Task], programs: Path, stack: ExitStack) -> Racer:
    """Prepare a contestant and call it once; its exceptions propagate."""
    began = time.perf_counter()
    if name == "JAX":
        from tests.benchmarks.jax_peer import JaxPeer

        peer = stack.enter_context(JaxPeer(work, weights, tasks))
        began = time.perf_counter()
        found = peer.result()
        compiling = peer.prepared["compile"]
        first, bytes_of_call = time.perf_counter() - began + compiling, int(peer.prepared["bytes"])
        return Racer(name, peer.turn, None, found, first, compiling, bytes_of_call)
    call = CONTESTANTS[name](work, weights, tasks, programs)
    found = call()
    return Racer(name, _make_timer(call), call, found, time.perf_counter() - began)


def _make_timer(call: Callable[[], MetaGrad]) -> Callable[[int], float]:
    def turn(calls: int) -> float:
        began = time.perf_counter()
        for _ in range(calls):
            call()
        return (time.perf_counter() - began) / calls

    return turn
