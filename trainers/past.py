"""Past tasks out of the durable history, on the trainer's device."""

import torch

from online_meta.types import Batch, Task
from streams.history import History


class HistoryPast:
    """The rounds of a durable history as a ``Past``; nothing needs to be remembered twice."""

    def __init__(self, history: History, device: torch.device) -> None:
        """Read from ``history`` and put tensors on ``device``."""
        self._history = history
        self._device = device

    def __getitem__(self, round: int, /) -> Task:
        """The task of that round."""
        task = self._history[round]
        return Task(*(Batch(*(tensor.to(self._device) for tensor in batch)) for batch in task))

    def remember(self, round: int, task: Task) -> None:
        """The history has it already."""
