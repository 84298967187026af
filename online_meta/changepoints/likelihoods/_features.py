"""Feature maps of the conjugate likelihoods, and the Student-t density that they predict with."""

import math
from collections.abc import Callable

import torch
from torch import Tensor


def require_sizes(inputs: int, outputs: int, **positive: float) -> None:
    """Raise ``ValueError`` unless both sizes are at least 1, and all of ``positive`` are finite and above 0."""
    if inputs < 1 or outputs < 1:
        raise ValueError(f"inputs is {inputs} and outputs is {outputs}; both must be at least 1")
    for name, value in positive.items():
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name} is {value}; it must be a finite number above 0")


def draw_fourier_features(inputs: int, features: int, scale: float, seed: int) -> Callable[[Tensor], Tensor]:
    """Return x -> sqrt(2 / n) cos(W x / ``scale`` + b), n = ``features`` (Rahimi & Recht, NeurIPS 2007).

    A linear model on these features approximates Gaussian process regression with an RBF kernel of length ``scale``.
    """
    random = torch.Generator().manual_seed(seed)
    frequencies = torch.randn(features, inputs, generator=random, dtype=torch.float64) / scale
    phases = 2 * math.pi * torch.rand(features, generator=random, dtype=torch.float64)
    return lambda x: math.sqrt(2 / features) * torch.cos(frequencies @ x + phases)


def draw_projection(inputs: int, features: int, seed: int) -> Callable[[Tensor], Tensor]:
    """Return x -> P x, a Gaussian random projection to ``features`` values that keeps their expected mean square."""
    random = torch.Generator().manual_seed(seed)
    matrix = torch.randn(features, inputs, generator=random, dtype=torch.float64) / math.sqrt(inputs)
    return lambda x: matrix @ x


def student_log_density(value: Tensor, degrees: Tensor, mean: Tensor, square: Tensor) -> Tensor:
    """Return the Student-t log density with ``degrees`` of freedom, location ``mean`` and squared scale ``square``."""
    half = degrees / 2
    normal = torch.lgamma(half + 0.5) - torch.lgamma(half) - 0.5 * torch.log(math.pi * degrees * square)
    return normal - (half + 0.5) * torch.log1p((value - mean).square() / (degrees * square))
