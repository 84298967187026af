"""The loss jumps where the task changes."""

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
    """Return the segmenter by a jump of the loss from one window of samples to the next.

    As Continual-MAML does (Caccia et al., NeurIPS 2020): with the loss -log p(sample | the run before it), there was a
    change where mean loss of the newest ``window`` samples - mean loss of the ``window`` before them > ``jump``. It is
    at the first of the newest whose own loss is as much above. One run is followed, not many: a sample costs a
    fraction of what it costs ``run_length``, and whether to wait or to risk a false alarm is up to ``jump`` alone.

    Args:
        likelihood: of a sample, given its run.
        jump: the difference, in nats a sample.
        window: how many samples are averaged; one is the original test, on samples instead of batches.
        least: no run is shorter, in samples: the losses of its first ones move by themselves.

    Raises:
        ValueError: if an option is out of its range.
    """
    if not (math.isfinite(jump) and jump > 0):
        raise ValueError(f"jump is {jump}: it is a number of nats above 0")
    if window < 1 or least < 1:
        raise ValueError(f"window is {window} and least {least}: both are 1 or more")

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
