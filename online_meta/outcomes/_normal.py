"""The normal distribution, for the outcomes that are made of it."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from online_meta.outcomes import sum_rows


def normal_nll(z: Tensor, log_std: Tensor | float) -> Tensor:
    """Return z^2 / 2 + log std + log(2 pi) / 2, (n,), summed over a row's own dimensions; z = (y - mean) / std."""
    return sum_rows(0.5 * z**2 + log_std + 0.5 * math.log(2 * math.pi))


def normal_cdf(z: Tensor) -> Tensor:
    """Return Phi(z), without cancellation in the lower tail."""
    return 0.5 * torch.erfc(-z / math.sqrt(2))


def scale_to_std(scale: Tensor, least: float) -> Tensor:
    """Return the standard deviation least + softplus(scale), softplus(a) = log(1 + e^a)."""
    return least + F.softplus(scale, threshold=40.0)  # Torch's threshold of 20 is too low for float64.


def std_to_scale(std: Tensor, least: float) -> Tensor:
    """Return the scale of a standard deviation above ``least``: the inverse of ``scale_to_std``."""
    excess = std - least
    return excess + (-torch.expm1(-excess)).log()
