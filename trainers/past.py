"""Past tasks out of the durable history, on the trainer's device."""

from collections.abc import Sequence

import torch

from online_meta.types import Batch, Task
from streams.history import History
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

    def __getitem__(self, round: int, /) -> Task:
        """The task of that round."""
        task = self._sent[round] if self._history is None else self._history[round]
        return Task(*(Batch(*(tensor.to(self._device) for tensor in batch)) for batch in task))

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
