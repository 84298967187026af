"""What exact Bayes predictors of sources share: the samples that they take, and the conditional normal distribution."""

import torch
from torch import Tensor

from online_meta.outcomes import describe_shape
from online_meta.outcomes import gaussian as gaussian_outcome
from online_meta.outcomes._normal import std_to_scale
from online_meta.prediction import point
from online_meta.types import Batch, Prediction, Tensors

LEAST_NOISE = 1e-3
"""The smallest noise, as a share of the deviation of the functions: with less, rounding would spoil exact answers."""


def require_noise(noise: float, deviation: float) -> None:
    """Raise ``ValueError`` if the noise is too small a share of the largest standard ``deviation`` of a function."""
    if noise < LEAST_NOISE * deviation:
        raise ValueError(
            f"noise is {noise:g}: it must be at least {LEAST_NOISE:g} of the standard deviation of the functions, "
            f"{deviation:g}, or exact answers would suffer from rounding"
        )


def read_samples(support: Batch, x: Tensors, inputs: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return x (n, inputs) and y (n,) of a support set, and x (m, inputs) of a query set, in float64 on the CPU.

    Raises ``ValueError`` if they have other shapes, or if samples have weights.
    """
    if support.weight is not None:
        raise ValueError("the support set has weights, but exact answers are to samples that count alike")
    given: dict[str, tuple[Tensors, int]] = {
        "x of the support set": (support.x, inputs),
        "y of the support set": (support.y, 1),
        "x of the query set": (x, inputs),
    }
    found = []
    for what, (values, size) in given.items():
        if not isinstance(values, Tensor) or values.ndim != 2 or values.shape[1] != size:
            raise ValueError(f"{what} has shape {describe_shape(values)}, but tasks of the source have (n, {size})")
        found.append(values.detach().cpu().double())
    return found[0], found[1][:, 0], found[2]


def predict_normal(mean: Tensor, covariance: Tensor, y: Tensor, noise: float) -> Prediction:
    """Return the distribution of the last of several values that are jointly normal, given noisy first ones.

    With f ~ N(m, C), y = f_1 + e and e ~ N(0, s^2), the predictive distribution of the others with the same noise is
    normal, with mean m_2 + C_21 (C_11 + s^2 I)^-1 (y - m_1) and the variances of
    C_22 - C_21 (C_11 + s^2 I)^-1 C_12 + s^2 I (Rasmussen and Williams, 2006, equations 2.23 and 2.24).

    Args:
        mean: m, (n + k,), float64.
        covariance: C, (n + k, n + k), float64.
        y: the observed values, (n,), float64; n may be 0.
        noise: s, above 0.

    Returns:
        The prediction of the k values, with targets (k, 1).
    """
    n = len(y)
    root = torch.linalg.cholesky(covariance[:n, :n] + noise**2 * torch.eye(n, dtype=y.dtype))
    whitened = torch.linalg.solve_triangular(
        root, torch.cat([covariance[:n, n:], (y - mean[:n])[:, None]], 1), upper=False
    )
    cross, residual = whitened[:, :-1], whitened[:, -1]
    variance = (covariance.diagonal()[n:] - (cross**2).sum(0)).clamp(min=0) + noise**2
    least = noise / 2  # Any bound below the noise will do.
    output = {"mean": mean[n:] + cross.T @ residual, "scale": std_to_scale(variance.sqrt(), least)}
    return point(gaussian_outcome.build(least=least), {name: value[:, None] for name, value in output.items()})
