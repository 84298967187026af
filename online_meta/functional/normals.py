"""Normal distributions of named tensors whose entries are independent: draws by key, and divergences."""

import torch
from torch import Tensor

from online_meta.functional.keyed import normal_like_all
from online_meta.types import Normal, Params

LOG_STD = ".log_std"
"""What follows the name of a tensor in the name of the logarithm of its standard deviation."""


def draw_normal(normal: Normal) -> Params:
    """Draw mean + std eps, eps standard normal by key, by name (Kingma & Welling, ICLR 2014, section 2.4).

    It is differentiable in mean and log_std. Raises ``RuntimeError`` outside of a ``keyed`` context.
    """
    noise = normal_like_all(normal.mean)
    return {name: mean + normal.log_std[name].exp() * noise[name] for name, mean in normal.mean.items()}


def kl_divergence(found: Normal, prior: Normal) -> Tensor:
    """Return KL(found || prior) = E_found[log found - log prior], a scalar in nats.

    Of each entry it is log(t / s) + (s^2 + (m - n)^2) / (2 t^2) - 1 / 2, for N(m, s^2) and N(n, t^2).
    """
    entries = []
    for name, mean in found.mean.items():
        log_ratio = found.log_std[name] - prior.log_std[name]
        shift = (mean - prior.mean[name]) * (-prior.log_std[name]).exp()
        entries.append((0.5 * ((2.0 * log_ratio).exp() + shift.square() - 1.0) - log_ratio).sum())
    return torch.stack(entries).sum()


def require_log_std(**options: float) -> None:
    """Raise ``ValueError`` for an initial logarithm of a standard deviation outside of -20 to 20."""
    for name, value in options.items():
        if not -20 <= value <= 20:
            raise ValueError(f"{name} is {value}: the logarithm of a standard deviation is in -20 to 20, such as -4")
