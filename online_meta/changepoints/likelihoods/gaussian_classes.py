"""Likelihood of labelled samples with one Gaussian per class; conjugate, so sums represent a run exactly."""

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
    """Return the likelihood p(x, y | run) = p(y | run) p(x | y, run) of class frequencies and class Gaussians.

    The class frequencies have a Dirichlet prior of ``concentration`` per class. For each class and each value of x, the
    variance v ~ InverseGamma(shape, spread) and the mean ~ N(0, v / strength), so p(x | y, run) is a product of
    Student-t densities. It responds to changes of the class frequencies, of the class means and variances, and of the
    labelling. The values of x should have a magnitude of about 1.

    Args:
        inputs: number of values in x, at least 1.
        outputs: number of classes, at least 1; y is an integer label.
        features: number of random projections of x, at least 0; 0 uses x itself. Use some dozens for images: their
            pixels are correlated, which the model would count as independent evidence.
        seed: seed of the projections, at least 0.
        concentration: weight of the prior of the class frequencies, in samples per class, above 0.
        strength: weight of the prior of the means, in samples, above 0.
        shape: shape of the prior of v, above 0; a smaller one is less informative.
        spread: scale of the prior of v, above 0; spread / shape is about the expected variance within a class.

    Returns:
        The likelihood.

    Raises:
        ValueError: if an option is out of its range.
    """
    require_sizes(inputs, outputs, concentration=concentration, strength=strength, shape=shape, spread=spread)
    if features < 0 or seed < 0:
        raise ValueError(f"features is {features} and seed is {seed}; both must be at least 0")
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
