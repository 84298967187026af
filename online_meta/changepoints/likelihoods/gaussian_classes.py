"""Labelled samples by a Gaussian a class: conjugate, so a run is a few sums and its prediction exact."""

from collections.abc import Callable
from functools import partial
from typing import Annotated, NamedTuple

import torch
from annotated_types import Ge, Gt
from torch import Tensor

from online_meta.changepoints.likelihoods._features import draw_projection, require_sizes, student_log_density
from online_meta.changepoints.segments import Likelihood
from online_meta.types import Params


def gaussian_classes(
    inputs: int,
    outputs: int,
    features: Annotated[int, Ge(0)] = 0,
    seed: Annotated[int, Ge(0)] = 0,
    concentration: Annotated[float, Gt(0)] = 1.0,
    strength: Annotated[float, Gt(0)] = 0.1,
    shape: Annotated[float, Gt(0)] = 1.0,
    spread: Annotated[float, Gt(0)] = 1.0,
) -> Likelihood:
    """Return p(x, y | run) = p(y | run) p(x | y, run): the labels' shares, and where the samples of a class lie.

    Shares have a Dirichlet prior of ``concentration`` a class; of each class and each number of x, the variance v
    is ~ InverseGamma(shape, spread) and the mean ~ N(0, v / strength), so p(x | y, run) is a product of Student-t. A
    change is in how often the classes come, in where they lie, or in which is which. The numbers of a sample are to be
    of about unit size.

    Args:
        inputs: how many numbers a sample has.
        outputs: how many classes there are.
        features: samples are seen by so many random projections; 0: as they are. Dozens will do for images, whose
            pixels, taken one by one, would make it far too sure of itself.
        seed: of the projections.
        concentration: how many samples of each class the prior of the shares is worth.
        strength: how many samples the prior of the means is worth.
        shape: of the prior of v; the smaller, the less is known of it.
        spread: of the prior of v; spread / shape is about the variance that is expected within a class.

    Raises:
        ValueError: if an option is out of its range.
    """
    require_sizes(inputs, outputs, concentration=concentration, strength=strength, shape=shape, spread=spread)
    if features < 0 or seed < 0:
        raise ValueError(f"features is {features} and seed is {seed}: both are 0 or more")
    project = draw_projection(inputs, features, seed) if features else lambda x: x
    size = features or inputs

    def start() -> Params:
        return {
            "counts": torch.zeros(1, outputs, dtype=torch.float64),
            "means": torch.zeros(1, outputs, size, dtype=torch.float64),
            "spreads": torch.full((1, outputs, size), float(spread), dtype=torch.float64),
        }

    prior = _Prior(project, concentration, strength, shape)
    return Likelihood(start, partial(_score, prior), partial(_update, prior))


class _Prior(NamedTuple):
    project: Callable[[Tensor], Tensor]
    concentration: float
    strength: float
    shape: float


def _score(prior: _Prior, runs: Params, x: Tensor, y: Tensor) -> Tensor:
    at, label, counts = prior.project(x.reshape(-1).double()), int(y), runs["counts"]
    share = torch.log(prior.concentration + counts[:, label])
    share = share - torch.log(counts.shape[1] * prior.concentration + counts.sum(1))
    known, half = prior.strength + counts[:, label, None], prior.shape + counts[:, label, None] / 2
    square = runs["spreads"][:, label] / half * (1 + 1 / known)
    return share + student_log_density(at, 2 * half, runs["means"][:, label], square).sum(1)


def _update(prior: _Prior, runs: Params, x: Tensor, y: Tensor) -> Params:
    at, label = prior.project(x.reshape(-1).double()), int(y)
    counts, means, spreads = (runs[name].clone() for name in ("counts", "means", "spreads"))
    known = prior.strength + counts[:, label, None]
    residual = at - means[:, label]
    means[:, label] += residual / (known + 1)
    spreads[:, label] += 0.5 * residual.square() * known / (known + 1)
    counts[:, label] += 1
    return {"counts": counts, "means": means, "spreads": spreads}
