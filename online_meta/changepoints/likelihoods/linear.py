"""Targets by Bayesian linear regression: conjugate, so a run is a few sums and its prediction exact."""

from collections.abc import Callable
from functools import partial
from typing import Annotated

import torch
from annotated_types import Ge, Gt
from torch import Tensor

from online_meta.changepoints.likelihoods._features import draw_fourier_features, require_sizes, student_log_density
from online_meta.changepoints.segments import Likelihood
from online_meta.types import Params

FeatureMap = Callable[[Tensor], Tensor]


def linear(
    inputs: int,
    outputs: int,
    features: Annotated[int, Ge(0)] = 0,
    scale: Annotated[float, Gt(0)] = 1.0,
    seed: Annotated[int, Ge(0)] = 0,
    strength: Annotated[float, Gt(0)] = 1.0,
    shape: Annotated[float, Gt(0)] = 1.0,
    spread: Annotated[float, Gt(0)] = 1.0,
) -> Likelihood:
    """Return p(y | x, run) of y = w' phi(x) + noise, w ~ N(0, v / strength), v ~ InverseGamma(shape, spread).

    Each output has weights and a noise variance v of its own; its prediction is a Student-t of 2 shape + n degrees of
    freedom after n samples (Gelman et al., Bayesian Data Analysis, 2013, section 14). Targets are to be of about unit
    size.

    Args:
        inputs: how many numbers a sample has.
        outputs: how many numbers a target has.
        features: phi(x) are a 1 and so many random waves; 0: a 1 and x itself.
        scale: over which distance of x a target changes much; for waves only.
        seed: of the waves.
        strength: how many samples the prior of the weights is worth.
        shape: of the prior of v; the smaller, the less is known of the noise.
        spread: of the prior of v; spread / shape is about the noise that is expected.

    Raises:
        ValueError: if an option is out of its range.
    """
    require_sizes(inputs, outputs, scale=scale, strength=strength, shape=shape, spread=spread)
    if features < 0 or seed < 0:
        raise ValueError(f"features is {features} and seed is {seed}: both are 0 or more")
    fourier = draw_fourier_features(inputs, features, scale, seed) if features else lambda x: x
    size = 1 + (features or inputs)

    def feature_map(x: Tensor) -> Tensor:
        return torch.cat([torch.ones(1, dtype=torch.float64), fourier(x.reshape(-1).double())])

    def start() -> Params:
        return {
            "covariance": torch.eye(size, dtype=torch.float64)[None] / strength,
            "weights": torch.zeros(1, size, outputs, dtype=torch.float64),
            "shape": torch.full((1,), float(shape), dtype=torch.float64),
            "spread": torch.full((1, outputs), float(spread), dtype=torch.float64),
        }

    return Likelihood(start, partial(_score, feature_map), partial(_update, feature_map))


def _predict(feature_map: FeatureMap, runs: Params, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the mean of y, covariance phi(x), and the variance of y in units of the noise."""
    phi = feature_map(x)
    gain = runs["covariance"] @ phi
    return phi @ runs["weights"], gain, 1 + gain @ phi


def _score(feature_map: FeatureMap, runs: Params, x: Tensor, y: Tensor) -> Tensor:
    mean, _, variance_scale = _predict(feature_map, runs, x)
    square = runs["spread"] / runs["shape"][:, None] * variance_scale[:, None]
    return student_log_density(y.reshape(-1).double(), 2 * runs["shape"][:, None], mean, square).sum(1)


def _update(feature_map: FeatureMap, runs: Params, x: Tensor, y: Tensor) -> Params:
    mean, gain, variance_scale = _predict(feature_map, runs, x)
    residual = y.reshape(-1).double() - mean
    part = gain / variance_scale[:, None]
    return {
        "covariance": runs["covariance"] - part[:, :, None] * gain[:, None, :],
        "weights": runs["weights"] + part[:, :, None] * residual[:, None, :],
        "shape": runs["shape"] + 0.5,
        "spread": runs["spread"] + 0.5 * residual.square() / variance_scale[:, None],
    }
