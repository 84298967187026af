"""A replay policy at work: it is asked draw by draw, and what it remembers goes with the learner."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from online_meta.replay import ReplayPolicy, ReplayRequest, ReplaySample
from online_meta.types import Params, TensorFilter

MEMORY_PREFIX = "replay."
"""What the names of a policy's memory begin with among those of a learner's state."""


class RoundsAndNext(Sequence[int]):
    """Rounds, and one more behind them."""

    def __init__(self, rounds: Sequence[int], last: int) -> None:
        """``last`` is above all of ``rounds``."""
        self._rounds, self._last = rounds, last

    def __len__(self) -> int:
        """Return how many they are."""
        return len(self._rounds) + 1

    def __getitem__(self, at: Any, /) -> Any:
        """Return the round in that place; of a slice, a list of them."""
        if isinstance(at, slice):
            return [self[index] for index in range(*at.indices(len(self)))]
        return self._last if at in (-1, len(self._rounds)) else self._rounds[at if at >= 0 else at + 1]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[np.int64]:
        """Return them as NumPy has them."""
        return np.append(np.asarray(self._rounds, np.int64), self._last)


def _append_round(rounds: Sequence[int], last: int) -> Sequence[int]:
    return range(rounds.start, last + 1) if isinstance(rounds, range) else RoundsAndNext(rounds, last)


class ReplaySampler:
    """Which rounds a learner revisits: ``replay``'s answers for ``seed``, at most ``batch`` a draw.

    ``gather(value)`` returns on every rank what each rank called it with, for measurements are each rank's own.
    """

    def __init__(self, replay: ReplayPolicy, seed: int, batch: int, gather: Callable[[Any], list[Any]]) -> None:
        """Begin with the policy's empty memory."""
        self.measure = replay.measure
        self._replay, self._seed, self._batch, self._gather = replay, seed, batch, gather
        self._memory = replay.start()
        self._request = ReplayRequest(seed, 0, 0, (), batch)
        self._measured: list[list[float]] = []

    def begin_round(self, round: int, available: Sequence[int]) -> None:
        """Begin the draws after ``round`` is learned, among the rounds that are ``available``."""
        self._request = ReplayRequest(self._seed, round, 0, available, self._batch)
        self._memory = self._replay.begin_round(self._memory, self._request)

    def resume_round(self, round: int, available: Sequence[int]) -> None:
        """Go on with the draws after ``round``, which were begun before, maybe by another process."""
        self._request = ReplayRequest(self._seed, round, 0, available, self._batch)

    def draw_samples(self, step: int) -> list[ReplaySample]:
        """Return the picks of the next meta-step."""
        self._request, self._measured = self._request._replace(step=step), []
        return self._replay.sample(self._memory, self._request)

    def observe(self, values: list[float]) -> None:
        """Take in what was measured of this rank's next pick."""
        self._measured.append(values)

    def finish_step(self, own: Sequence[ReplaySample]) -> None:
        """End the draw: let the policy know what all ranks have measured, this one of its ``own`` picks."""
        if self.measure is None:
            return
        mine = [[sample.round, *values] for sample, values in zip(own, self._measured, strict=True)]
        rows = sorted(row for share in self._gather(mine) for row in share)
        rounds, values = [int(row[0]) for row in rows], torch.tensor([row[1:] for row in rows], dtype=torch.float64)
        self._memory = self._replay.record(self._memory, self._request, rounds, values)

    def predict_samples(self, steps: int) -> Iterator[list[ReplaySample]]:
        """Tell what will be revisited after this round, and after the next one if that is one task more.

        What draws to come learn by measuring cannot be foreseen; a wrong guess costs a read in vain.
        """
        request = self._request
        after = request._replace(round=request.round + 1, rounds=_append_round(request.rounds, request.round + 1))
        for one in (request, after) if self.measure is None else (request,):
            memory = self._memory if one is request else self._replay.begin_round(self._memory, one)
            for step in range(steps):
                yield self._replay.sample(memory, one._replace(step=step))

    def save(self, keep: TensorFilter | None = None) -> Params:
        """Return the policy's memory, or what ``keep`` keeps of it, by names that begin with ``replay.``."""
        named = {MEMORY_PREFIX + name: value for name, value in self._memory.items()}
        return {name: value.clone() for name, value in named.items() if keep is None or keep(name)}

    def load(self, saved: Params) -> Params:
        """Take up what ``save`` gave among a learner's ``saved`` state; return the rest of it."""
        mine = {
            name.removeprefix(MEMORY_PREFIX): value for name, value in saved.items() if name.startswith(MEMORY_PREFIX)
        }
        self._memory = self._replay.start() | mine
        return {name: value for name, value in saved.items() if not name.startswith(MEMORY_PREFIX)}
