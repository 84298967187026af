"""Past tasks out of the durable history, on the trainer's device."""

from collections.abc import Sequence

import numpy as np
import torch

from online_meta.types import Batch, Task
from streams.history import History
from streams.retention import KeptRounds, last_decision, sample_of
from streams.wire import decode_kept
from trainers.crew import ALONE, Crew


class HistoryPast:
    """The rounds of a durable history as a ``Past``; nothing needs to be remembered twice.

    A rank on another machine than the history has none: it gets each task as it is needed, and forgets it then.
    """

    def __init__(self, history: History | None, device: torch.device, crew: Crew = ALONE) -> None:
        """Read from ``history``, None on another machine, and put tensors on ``device``."""
        self._history, self._device, self._crew = history, device, crew
        self._sent: dict[int, Task] = {}
        self._decided, self._sample = 0, np.array([], np.int64)

    def __getitem__(self, round: int, /) -> Task:
        """The task of that round."""
        task = self._sent[round] if self._history is None else self._history[round]
        return Task(*(Batch(*(tensor.to(self._device) for tensor in batch)) for batch in task))

    def kept(self, count: int) -> Sequence[int]:
        """Which retention has not taken out of play then; all ranks have to call it."""
        crew = self._crew
        decided = last_decision(self._history.ask, count) if self._history is not None else 0
        decided = crew.share(decided) if crew.far else decided
        if decided != self._decided:
            sample = [] if self._history is None else sample_of(self._history.ask, decided).tolist()
            self._decided, self._sample = decided, np.array(crew.share(sample) if crew.far else sample, np.int64)
        return KeptRounds(self._sample, decided, count)

    def hand_out(self, shares: Sequence[Sequence[int]]) -> None:
        """Send each rank that has no history the rounds in its share; all ranks have to call it."""
        crew = self._crew
        if not crew.far:
            return
        if self._history is None:
            mine = shares[crew.rank]
            self._sent = dict(zip(mine, map(decode_kept, crew.send(None)), strict=True))
        elif crew.leads:
            crew.send({rank: [self._history.payload(round) for round in shares[rank]] for rank in crew.far})

    def remember(self, round: int, task: Task) -> None:
        """The history has it already."""
