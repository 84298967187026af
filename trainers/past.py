"""Past tasks out of the durable history, on the trainer's device."""

import time
from collections.abc import Hashable, Iterable, Sequence

import numpy as np
import torch

from online_meta.types import Batch, Task
from streams.history import History
from streams.retention import RetainedRounds, last_decision, retained_rounds
from streams.wire import decode_payload
from trainers.ahead import TaskPrefetcher
from trainers.crew import SINGLE_PROCESS, RankGroup


class HistoryBuffer:
    """The rounds of a durable history as a ``ReplayBuffer``; nothing needs to be remembered twice.

    ``waited_seconds`` is how long those who asked have waited for tasks to be read.
    A rank on another machine than the history has none: it gets each task as it is needed, and forgets it then.
    """

    def __init__(self, history: History | None, device: torch.device, rank_group: RankGroup = SINGLE_PROCESS) -> None:
        """Read from ``history``, None on another machine, and put tensors on ``device``."""
        self._history, self._device, self._crew = history, device, rank_group
        self._received: dict[int, Task] = {}
        self._prefetcher = None if history is None else TaskPrefetcher(history)
        self.waited_seconds = 0.0
        self._decided, self._sample = 0, np.array([], np.int64)

    def __getitem__(self, round: int, /) -> Task:
        """The task of that round."""
        start_time = time.perf_counter()
        task = self._read(round)
        self.waited_seconds += time.perf_counter() - start_time
        return Task(*(Batch(*(tensor.to(self._device) for tensor in batch)) for batch in task))

    def _read(self, round: int) -> Task:
        if self._history is None or self._prefetcher is None:
            return self._received[round]
        return self._prefetcher.take(round) or self._history.tasks([round])[0]

    def prefetch(self, reader: Hashable, rounds: Iterable[int]) -> None:
        """Read rounds that ``reader`` will ask for next, in their order, while something else is computed."""
        if self._prefetcher is not None:
            self._prefetcher.prefetch(reader, rounds)

    def close(self) -> None:
        """Read nothing ahead any more."""
        if self._prefetcher is not None:
            self._prefetcher.close()

    def available(self, count: int) -> Sequence[int]:
        """Which retention has not taken out of play then; all ranks have to call it."""
        rank_group = self._crew
        decided = last_decision(self._history.query, count) if self._history is not None else 0
        decided = rank_group.broadcast(decided) if rank_group.remote else decided
        if decided != self._decided:
            sample = [] if self._history is None else retained_rounds(self._history.query, decided).tolist()
            self._decided, self._sample = (
                decided,
                np.array(rank_group.broadcast(sample) if rank_group.remote else sample, np.int64),
            )
        return RetainedRounds(self._sample, decided, count) if decided else range(count)

    def distribute(self, shares: Sequence[Sequence[int]]) -> None:
        """Send each rank that has no history the rounds in its share; all ranks have to call it."""
        rank_group = self._crew
        if not rank_group.remote:
            return
        if self._history is None:
            own_rounds = shares[rank_group.rank]
            self._received = dict(zip(own_rounds, map(decode_payload, rank_group.send(None)), strict=True))
        elif rank_group.is_coordinator:
            rank_group.send({rank: self._history.payloads(shares[rank]) for rank in rank_group.remote})

    def add(self, round: int, task: Task) -> None:
        """The history has it already."""
