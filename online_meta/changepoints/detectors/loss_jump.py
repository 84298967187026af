"""Detect a change by a jump of the loss between two windows of samples."""

import math
from typing import Annotated

import torch
from annotated_types import Ge, Gt
from torch import Tensor

from online_meta.changepoints.segments import Likelihood, Segmenter, add_prefix, strip_prefix
from online_meta.types import Params

_RUN_PREFIX = "run."


def loss_jump(
    likelihood: Likelihood,
    jump: Annotated[float, Gt(0)] = 2.0,
    window: Annotated[int, Ge(1)] = 5,
    least: Annotated[int, Ge(1)] = 10,
) -> Segmenter:
    """Return a segmenter that detects a jump of the loss from one window of samples to the next.

    As in Continual-MAML (Caccia et al., NeurIPS 2020): with the loss -log p(sample | the run before it), a change is
    reported if mean loss of the newest ``window`` samples - mean loss of the ``window`` before them > ``jump``. It is
    placed at the first of the newest samples whose own loss exceeds the older mean by more than ``jump``. Only one run
    is tracked, so a sample costs less than with ``run_length``; ``jump`` alone sets the trade-off between delay and
    false alarms.

    Args:
        likelihood: log p(sample | run).
        jump: the difference in nats per sample, above 0.
        window: the number of samples averaged, at least 1; 1 is the original test, on samples instead of batches.
        least: the minimum length of a run in samples, at least 1; the losses of the first samples vary on their own.

    Returns:
        The segmenter.

    Raises:
        ValueError: if an option is out of its range.
    """
    if not (math.isfinite(jump) and jump > 0):
        raise ValueError(f"jump is {jump}; it must be a finite number of nats above 0")
    if window < 1 or least < 1:
        raise ValueError(f"window is {window} and least is {least}; both must be at least 1")

    def start() -> Params:
        losses = torch.zeros(0, dtype=torch.float64)
        return {"met": torch.tensor(0), "losses": losses, **add_prefix(_RUN_PREFIX, likelihood.start())}

    def update(memory: Params, x: Tensor, y: Tensor) -> Params:
        run = strip_prefix(_RUN_PREFIX, memory)
        losses = torch.cat([memory["losses"], -likelihood.score(run, x, y)])[-2 * window :]
        return {"met": memory["met"] + 1, "losses": losses, **add_prefix(_RUN_PREFIX, likelihood.update(run, x, y))}

    def change(memory: Params) -> int | None:
        met, losses = int(memory["met"]), memory["losses"]
        if len(losses) < 2 * window:
            return None
        rises = losses[window:] - losses[:window].mean()
        if float(rises.mean()) <= jump:
            return None
        count = met - window + int((rises > jump).int().argmax())
        return count if count >= least else None

    return Segmenter(start, update, change)
