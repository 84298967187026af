"""Models that fail on marked tasks: those with an input above ``MARK``."""

import os
from typing import Any

import torch
from torch import Tensor, nn

import trainers.models

MARK = 50.0
ERRORS = {"ValueError": ValueError, "MemoryError": MemoryError, "OSError": OSError, "exit": None}


class Poisoned(nn.Module):
    """A perceptron that raises ``error`` on a marked input, or ends the process if it is "exit".

    ``where`` is "forward" (always) or "backward" (only where gradients flow, so that scoring succeeds). If ``switch``
    is given, the model fails only while that file exists; if ``only_rank`` is, on that rank alone.
    """

    def __init__(
        self, where: str, error: str, switch: str | None, only_rank: str | None, arguments: dict[str, Any]
    ) -> None:
        super().__init__()
        self.net = trainers.models.mlp(**arguments)
        self._where, self._error, self._switch, self._only_rank = where, ERRORS[error], switch, only_rank

    def forward(self, x: Tensor) -> Tensor:
        if self._fails() and float(_unwrap(x).max()) > MARK:
            if self._error is None:
                os._exit(9)
            raise self._error("a marked task")
        result: Tensor = self.net(x)
        return result

    def _fails(self) -> bool:
        if self._only_rank is not None and os.environ.get("RANK") != self._only_rank:
            return False
        if self._switch is not None and not os.path.exists(self._switch):
            return False
        return self._where == "forward" or torch.is_grad_enabled()


def _unwrap(x: Tensor) -> Tensor:
    """Return the tensor under the wrappers of torch.func, whose values can be read."""
    while torch._C._functorch.is_functorch_wrapped_tensor(x):
        x = torch._C._functorch.get_unwrapped(x)
    return x.detach()


def build(
    where: str = "forward",
    error: str = "ValueError",
    switch: str | None = None,
    only_rank: str | None = None,
    **arguments: Any,
) -> Poisoned:
    """Build the model; ``arguments`` are those of the perceptron."""
    return Poisoned(where, error, switch, only_rank, arguments)
