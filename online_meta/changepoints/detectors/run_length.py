"""Bayesian online changepoint detection: the posterior over the length of the current run."""

import math
from functools import partial
from typing import Annotated

import torch
from annotated_types import Ge, Gt, Lt
from torch import Tensor

from online_meta.changepoints.segments import Likelihood, Segmenter, add_prefix, concat_runs, select_runs, strip_prefix
from online_meta.types import Params

_RUN_PREFIX = "run."


def run_length(
    likelihood: Likelihood,
    hazard: Annotated[float, Gt(0), Lt(1)] = 0.01,
    certainty: Annotated[float, Gt(0), Lt(1)] = 0.9,
    least: Annotated[int, Ge(1)] = 2,
    hypotheses: Annotated[int, Ge(2)] = 50,
) -> Segmenter:
    """Return the segmenter of Bayesian online changepoint detection (Adams & MacKay, 2007).

    Let r_t be the length of the run up to and including sample t, and h the prior probability of a change before a
    sample (0 if the run is shorter than ``least``). Then

        p(r_t = r + 1, D_t) = p(d_t | the last r samples) (1 - h) p(r_{t-1} = r, D_{t-1})
        p(r_t = 1, D_t)     = p(d_t | no sample) sum_r h p(r_{t-1} = r, D_{t-1}).

    A change is reported once p(no change since the start | D_t) is at most 1 - ``certainty``; it is placed where the
    most probable of the shorter runs begins. With the loss of an adapted model as ``likelihood`` this is the
    segmentation of MOCA (Harrison et al., NeurIPS 2020).

    Args:
        likelihood: log p(sample | run).
        hazard: h, in (0, 1); the expected length of a run is 1 / h samples.
        certainty: the posterior probability of a change at which it is reported, in (0, 1).
        least: the minimum length of a run in samples, at least 1.
        hypotheses: the number of run lengths kept, at least 2: no change, and the most probable others. Memory and time
            per sample grow with it, not with the length of the run.

    Returns:
        The segmenter.

    Raises:
        ValueError: if an option is out of its range.
    """
    for name, value in (("hazard", hazard), ("certainty", certainty)):
        if not 0 < value < 1:
            raise ValueError(f"{name} is {value}; it must lie strictly between 0 and 1")
    if least < 1 or hypotheses < 2:
        raise ValueError(f"least is {least} and hypotheses is {hypotheses}; they must be at least 1 and 2")

    def start() -> Params:
        zero = torch.zeros(1, dtype=torch.float64)
        return {
            "lengths": torch.zeros(1, dtype=torch.int64),
            "logs": zero,
            **add_prefix(_RUN_PREFIX, likelihood.start()),
        }

    update = partial(_update, likelihood, hazard, least, hypotheses)
    return Segmenter(start, update, partial(_change, certainty))


def _update(
    likelihood: Likelihood, hazard: float, least: int, hypotheses: int, memory: Params, x: Tensor, y: Tensor
) -> Params:
    runs, lengths, logs = strip_prefix(_RUN_PREFIX, memory), memory["lengths"], memory["logs"]
    may_end = lengths >= least
    growth = logs + may_end.double() * math.log1p(-hazard) + likelihood.score(runs, x, y)
    if bool(may_end.any()):
        new_run = likelihood.start()
        changepoint = (
            torch.logsumexp(logs[may_end], 0, keepdim=True) + math.log(hazard) + likelihood.score(new_run, x, y)
        )
        runs, logs = concat_runs(runs, new_run), torch.cat([growth, changepoint])
        lengths = torch.cat([lengths, lengths.new_zeros(1)])
    else:
        logs = growth
    kept = _prune(logs, hypotheses)
    logs = logs[kept] - torch.logsumexp(logs[kept], 0)
    runs = likelihood.update(select_runs(runs, kept), x, y)
    return {"lengths": lengths[kept] + 1, "logs": logs, **add_prefix(_RUN_PREFIX, runs)}


def _change(certainty: float, memory: Params) -> int | None:
    lengths, logs = memory["lengths"], memory["logs"]
    if float(logs[0].exp()) > 1 - certainty:
        return None
    return int(lengths[0] - lengths[1 + int(logs[1:].argmax())])


def _prune(logs: Tensor, count: int) -> Tensor:
    """Return the indices of the first and of the ``count`` - 1 most probable others, in ascending order."""
    if len(logs) <= count:
        return torch.arange(len(logs))
    best = torch.sort(logs[1:], descending=True, stable=True).indices[: count - 1]
    return torch.cat([torch.zeros(1, dtype=torch.int64), 1 + torch.sort(best).values])
