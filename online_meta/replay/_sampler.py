"""Run a replay policy for a learner: draw its meta-batches and keep its memory with the learner's state."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from online_meta.replay import ReplayPolicy, ReplayRequest, ReplaySample
from online_meta.types import Params, TensorFilter

MEMORY_PREFIX = "replay."
"""Prefix of the names of a policy's memory in a learner's saved state."""


class RoundsAndNext(Sequence[int]):
    """A sequence of rounds followed by one more."""

    def __init__(self, rounds: Sequence[int], last: int) -> None:
        """Append ``last``, which is greater than all of ``rounds``."""
        self._rounds, self._last = rounds, last

    def __len__(self) -> int:
        """Return the number of rounds."""
        return len(self._rounds) + 1

    def __getitem__(self, at: Any, /) -> Any:
        """Return the round at an index, or a list of rounds for a slice."""
        if isinstance(at, slice):
            return [self[index] for index in range(*at.indices(len(self)))]
        return self._last if at in (-1, len(self._rounds)) else self._rounds[at if at >= 0 else at + 1]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[np.int64]:
        """Return the rounds as a NumPy array."""
        return np.append(np.asarray(self._rounds, np.int64), self._last)


def _append_round(rounds: Sequence[int], last: int) -> Sequence[int]:
    return range(rounds.start, last + 1) if isinstance(rounds, range) else RoundsAndNext(rounds, last)


class ReplaySampler:
    """Draws the rounds that a learner revisits: samples of ``replay`` for ``seed``, at most ``batch`` per draw.

    ``gather(value)`` returns on every rank the list of all ranks' values; it shares the measurements of each rank.
    """

    def __init__(self, replay: ReplayPolicy, seed: int, batch: int, gather: Callable[[Any], list[Any]]) -> None:
        """Start with the policy's initial memory."""
        self.measure = replay.measure
        self._replay, self._seed, self._batch, self._gather = replay, seed, batch, gather
        self._memory = replay.start()
        self._request = ReplayRequest(seed, 0, 0, (), batch)
        self._measured: list[list[float]] = []

    def begin_round(self, round: int, available: Sequence[int]) -> None:
        """Start the draws after ``round`` from the ``available`` rounds; update the policy's memory."""
        self._request = ReplayRequest(self._seed, round, 0, available, self._batch)
        self._memory = self._replay.begin_round(self._memory, self._request)

    def resume_round(self, round: int, available: Sequence[int]) -> None:
        """Continue the draws after ``round``, for which ``begin_round`` was called before, maybe in another process."""
        self._request = ReplayRequest(self._seed, round, 0, available, self._batch)

    def draw_samples(self, step: int) -> list[ReplaySample]:
        """Return the samples of meta-step ``step``."""
        self._request, self._measured = self._request._replace(step=step), []
        return self._replay.sample(self._memory, self._request)

    def observe(self, values: list[float]) -> None:
        """Add the measurement of this rank's next sample."""
        self._measured.append(values)

    def finish_step(self, own: Sequence[ReplaySample]) -> None:
        """End the draw: gather the measurements of all ranks and record them; ``own`` are this rank's samples."""
        if self.measure is None:
            return
        # A sum that failed has measured only some of its samples; whoever plays the update discards it.
        mine = [[sample.round, *values] for sample, values in zip(own, self._measured, strict=False)]
        rows = sorted(row for share in self._gather(mine) for row in share)
        rounds, values = [int(row[0]) for row in rows], torch.tensor([row[1:] for row in rows], dtype=torch.float64)
        self._memory = self._replay.record(self._memory, self._request, rounds, values)

    def predict_samples(self, steps: int) -> Iterator[list[ReplaySample]]:
        """Yield the samples expected after this round, and after the next one if one task arrives, for prefetching.

        Policies that measure gradients are predicted for this round only, without the coming measurements. A wrong
        prediction costs an unnecessary read.
        """
        request = self._request
        after = request._replace(round=request.round + 1, rounds=_append_round(request.rounds, request.round + 1))
        for one in (request, after) if self.measure is None else (request,):
            memory = self._memory if one is request else self._replay.begin_round(self._memory, one)
            for step in range(steps):
                yield self._replay.sample(memory, one._replace(step=step))

    def save(self, keep: TensorFilter | None = None) -> Params:
        """Return copies of the policy's memory under the prefix ``replay.``; only names that ``keep`` accepts."""
        named = {MEMORY_PREFIX + name: value for name, value in self._memory.items()}
        return {name: value.clone() for name, value in named.items() if keep is None or keep(name)}

    def load(self, saved: Params) -> Params:
        """Restore the memory that ``save`` returned from a learner's ``saved`` state; return the rest of the state."""
        mine = {
            name.removeprefix(MEMORY_PREFIX): value for name, value in saved.items() if name.startswith(MEMORY_PREFIX)
        }
        self._memory = self._replay.start() | mine
        return {name: value for name, value in saved.items() if not name.startswith(MEMORY_PREFIX)}
