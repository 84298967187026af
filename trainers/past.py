"""Past tasks out of the durable history, on the trainer's device."""

import time
from collections.abc import Hashable, Iterable, Sequence

import numpy as np
import torch

from online_meta.types import Batch, Task
from streams.history import History
from streams.retention import RetainedRounds, last_decision, retained_rounds
from streams.wire import decode_payload
from trainers.ahead import ReadAhead
from trainers.crew import ALONE, Crew


class HistoryPast:
    """The rounds of a durable history as a ``Past``; nothing needs to be remembered twice.

    ``waited_seconds`` is how long those who asked have waited for tasks to be read.
    A rank on another machine than the history has none: it gets each task as it is needed, and forgets it then.
    """

    def __init__(self, history: History | None, device: torch.device, crew: Crew = ALONE) -> None:
        """Read from ``history``, None on another machine, and put tensors on ``device``."""
        self._history, self._device, self._crew = history, device, crew
        self._sent: dict[int, Task] = {}
        self._ahead = None if history is None else ReadAhead(history)
        self.waited_seconds = 0.0
        self._decided, self._sample = 0, np.array([], np.int64)

    def __getitem__(self, round: int, /) -> Task:
        """The task of that round."""
        began = time.perf_counter()
        task = self._read(round)
        self.waited_seconds += time.perf_counter() - began
        return Task(*(Batch(*(tensor.to(self._device) for tensor in batch)) for batch in task))

    def _read(self, round: int) -> Task:
        if self._history is None or self._ahead is None:
            return self._sent[round]
        return self._ahead.take(round) or self._history.tasks([round])[0]

    def expect(self, reader: Hashable, rounds: Iterable[int]) -> None:
        """Read rounds that ``reader`` will ask for next, in their order, while something else is computed."""
        if self._ahead is not None:
            self._ahead.expect(reader, rounds)

    def close(self) -> None:
        """Read nothing ahead any more."""
        if self._ahead is not None:
            self._ahead.close()

    def kept(self, count: int) -> Sequence[int]:
        """Which retention has not taken out of play then; all ranks have to call it."""
        crew = self._crew
        decided = last_decision(self._history.query, count) if self._history is not None else 0
        decided = crew.share(decided) if crew.far else decided
        if decided != self._decided:
            sample = [] if self._history is None else retained_rounds(self._history.query, decided).tolist()
            self._decided, self._sample = decided, np.array(crew.share(sample) if crew.far else sample, np.int64)
        return RetainedRounds(self._sample, decided, count) if decided else range(count)

    def hand_out(self, shares: Sequence[Sequence[int]]) -> None:
        """Send each rank that has no history the rounds in its share; all ranks have to call it."""
        crew = self._crew
        if not crew.far:
            return
        if self._history is None:
            mine = shares[crew.rank]
            self._sent = dict(zip(mine, map(decode_payload, crew.send(None)), strict=True))
        elif crew.leads:
            crew.send({rank: self._history.payloads(shares[rank]) for rank in crew.far})

    def remember(self, round: int, task: Task) -> None:
        """The history has it already."""
