"""The likelihood of a sample under the leader, adapted to the samples of its run."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from online_meta.answers import predict
from online_meta.batches import count_samples
from online_meta.changepoints.segments import Likelihood, add_prefix, strip_prefix
from online_meta.inner import Inner
from online_meta.prediction import loss_of
from online_meta.regret.scoring import score_task
from online_meta.types import Batch, Belief, LossFn, Meta, Params, Task

ADAPTATION_SIZES = (1, 2, 5, 10)
_MAX_LOSS = 1e30
_WEIGHT_PREFIX = "weight."


Believe = Callable[[Batch], Belief]
"""A support set, of any number of samples -> what the leader believes after adapting to it."""


def leader_likelihood(
    believe: Believe,
    loss: LossFn,
    x: Tensor,
    y: Tensor,
    sizes: Sequence[int] = ADAPTATION_SIZES,
    errors: Sequence[float] | None = None,
    shape: float = 1.0,
) -> Likelihood:
    """Return p(sample | run) from the loss L of the model adapted to the run (Harrison et al., NeurIPS 2020).

    The model of a run adapts each time its length reaches one of ``sizes``, and not after the last of them: samples
    after a change then do not affect the model that they are scored with, and few runs adapt at each sample.

    For a negative log-likelihood such as cross-entropy, log p = -L. A mean square error has no scale: d L / s_n is the
    sum of d squares of a Gaussian with variance v ~ InverseGamma(shape, shape), where s_n is the expected error after
    adapting to n samples, and p is the Student-t given the errors of the run so far.

    Args:
        believe: adapts the leader, as it answers and is scored.
        loss: the model's loss.
        x: any sample, without a batch dimension; its shape and dtype are used.
        y: the label or target of ``x``, of d values.
        sizes: the run lengths at which the model adapts, in samples, ascending from 1 or more.
        errors: the expected mean square errors s for 0 samples and each of ``sizes``, above 0, from ``measure_errors``;
            None for a negative log-likelihood.
        shape: shape of the prior of v, above 0; a smaller one lets tasks differ more in their errors.

    Returns:
        The likelihood.

    Raises:
        ValueError: if ``sizes`` do not ascend from 1 or more, there is not one error for 0 samples and each of
            ``sizes``, an error is not positive, or ``shape`` is not above 0.
    """
    _check(sizes, errors, shape)
    expected = None if errors is None else torch.tensor(errors, dtype=torch.float64)
    leader = _Leader(believe, loss, tuple(sizes), expected, shape)

    def start() -> Params:
        xs, ys = (torch.zeros((1, sizes[-1], *one.shape), dtype=one.dtype) for one in (x, y))
        belief = believe(Batch(xs[0, :0], ys[0, :0]))
        weights = {name: value[None] for name, value in _pack_belief(belief).items()}
        count, total = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.float64)
        return {"x": xs, "y": ys, "counts": count, "squares": total, **add_prefix(_WEIGHT_PREFIX, weights)}

    return Likelihood(start, partial(_score, leader), partial(_update, leader))


class _Leader(NamedTuple):
    believe: Believe
    loss: LossFn
    sizes: tuple[int, ...]
    expected: Tensor | None
    shape: float


def _run_losses(leader: _Leader, runs: Params, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return the loss of each run's model and its expected error (None without ``errors``)."""

    def loss(packed: Params) -> Tensor:
        return loss_of(predict(leader.loss, _unpack_belief(packed), x[None]), y[None])

    with torch.no_grad():
        losses = torch.vmap(loss)(strip_prefix(_WEIGHT_PREFIX, runs)).double()
    # If adapting to a run diverged, the run gets a very low probability instead of NaN.
    losses = torch.nan_to_num(losses, nan=_MAX_LOSS, posinf=_MAX_LOSS).clamp(max=_MAX_LOSS)
    if leader.expected is None:
        return losses, None
    return losses, leader.expected[torch.searchsorted(torch.tensor(leader.sizes), runs["counts"], right=True)]


def _score(leader: _Leader, runs: Params, x: Tensor, y: Tensor) -> Tensor:
    losses, expected = _run_losses(leader, runs, x, y)
    if expected is None:
        return -losses
    half = leader.shape + 0.5 * y.numel() * runs["counts"].double()
    spread = leader.shape + 0.5 * runs["squares"]
    return _student_log_density_of_square(y.numel() * losses, y.numel(), 2 * half, expected * spread / half)


def _update(leader: _Leader, runs: Params, x: Tensor, y: Tensor) -> Params:
    losses, expected = _run_losses(leader, runs, x, y)
    found = {name: values.clone() for name, values in runs.items()}
    if expected is not None:
        found["squares"] += y.numel() * losses / expected
    growing = torch.nonzero(runs["counts"] < leader.sizes[-1]).reshape(-1)
    places = runs["counts"][growing]
    found["x"][growing, places], found["y"][growing, places] = x, y
    found["counts"] += 1
    for place, count in enumerate(found["counts"].tolist()):
        if count in leader.sizes:
            support = Batch(found["x"][place, :count], found["y"][place, :count])
            for name, value in _pack_belief(leader.believe(support)).items():
                found[_WEIGHT_PREFIX + name][place] = value
    return found


_LOG_WEIGHTS = "log_weights"


def _pack_belief(belief: Belief) -> Params:
    return {**add_prefix("params.", belief.params), _LOG_WEIGHTS: belief.log_weights}


def _unpack_belief(packed: Params) -> Belief:
    return Belief(strip_prefix("params.", packed), packed[_LOG_WEIGHTS])


def measure_errors(
    inner: Inner, meta: Meta, tasks: Sequence[Task], sizes: Sequence[int] = ADAPTATION_SIZES
) -> list[float]:
    """Return the mean query loss over ``tasks`` before adaptation and after adapting to the first samples of support.

    The list has one loss for 0 samples, then one for each of ``sizes``. Raises ``ValueError`` if there is no task, or
    one with fewer support samples than the largest of ``sizes``.
    """
    if not tasks or any(count_samples(task.support) < max(sizes) for task in tasks):
        raise ValueError(f"give at least one task, each with at least {max(sizes)} support samples")
    totals = dict.fromkeys((0, *sizes), 0.0)
    for task in tasks:
        score = score_task(inner, meta, task, sizes)
        losses = {prefix.points: prefix.loss for prefix in score.prefixes}
        losses |= {0: score.loss_before, count_samples(task.support): score.loss_after}
        totals = {size: total + losses[size] for size, total in totals.items()}
    return [total / len(tasks) for total in totals.values()]


def _check(sizes: Sequence[int], errors: Sequence[float] | None, shape: float) -> None:
    if list(sizes) != sorted(set(sizes)) or not sizes or sizes[0] < 1:
        raise ValueError(f"sizes are {list(sizes)}: they must ascend from 1 or more")
    if errors is not None and not (len(errors) == len(sizes) + 1 and min(errors) > 0):
        raise ValueError(f"errors are {errors}: there must be one above 0 for each of {[0, *sizes]} samples")
    if not shape > 0:
        raise ValueError(f"shape is {shape}; it must be above 0")


def _student_log_density_of_square(square: Tensor, size: int, degrees: Tensor, scale: Tensor) -> Tensor:
    """Return log of the ``size``-dimensional Student-t density at a point whose squared distance is ``square``."""
    half = degrees / 2
    normal = torch.lgamma(half + size / 2) - torch.lgamma(half) - size / 2 * torch.log(torch.pi * degrees * scale)
    return normal - (half + size / 2) * torch.log1p(square / (degrees * scale))
