"""Likelihood of targets by Bayesian linear regression; conjugate, so sums represent a run exactly."""

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
    """Return the likelihood p(y | x, run) of Bayesian linear regression.

    y = w' phi(x) + noise, w ~ N(0, v / strength), v ~ InverseGamma(shape, spread). Each output has its own weights and
    noise variance v. Its prediction is a Student-t with 2 shape + n degrees of freedom after n samples (Gelman et al.,
    Bayesian Data Analysis, 2013, section 14). Targets should have a magnitude of about 1.

    Args:
        inputs: number of values in x, at least 1.
        outputs: number of values in y, at least 1.
        features: number of random Fourier features, at least 0; phi(x) is 1 and the features, or 1 and x itself for 0.
        scale: length scale of the Fourier features, in units of x, above 0.
        seed: seed of the Fourier features, at least 0.
        strength: weight of the prior of w, in samples, above 0.
        shape: shape of the prior of v, above 0; a smaller one is less informative.
        spread: scale of the prior of v, above 0; spread / shape is about the expected noise variance.

    Returns:
        The likelihood.

    Raises:
        ValueError: if an option is out of its range.
    """
    require_sizes(inputs, outputs, scale=scale, strength=strength, shape=shape, spread=spread)
    if features < 0 or seed < 0:
        raise ValueError(f"features is {features} and seed is {seed}; both must be at least 0")
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
    """Return the mean of y, covariance phi(x), and the variance of y in units of the noise variance."""
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
