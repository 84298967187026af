"""The normal distribution, for ``gaussian`` and ``gaussian_of_noise``."""

import math

import torch
from torch import Tensor

from online_meta.outcomes import sum_rows


def normal_nll(z: Tensor, log_std: Tensor | float) -> Tensor:
    """Return z^2 / 2 + log std + log(2 pi) / 2, (n,), summed over a row's own dimensions; z = (y - mean) / std."""
    return sum_rows(0.5 * z**2 + log_std + 0.5 * math.log(2 * math.pi))


def normal_cdf(z: Tensor) -> Tensor:
    """Return Phi(z), without cancellation in the lower tail."""
    return 0.5 * torch.erfc(-z / math.sqrt(2))
