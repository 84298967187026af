"""A loss with an edge: beyond some size of its outputs the model falls off."""

import torch
from torch import Tensor
from torch.nn import functional as F

EDGE = 6.0


def loss(output: Tensor, y: Tensor) -> Tensor:
    """Return the cross-entropy, which is not a number where any output is larger than ``EDGE``."""
    fallen = (output.abs().max() > EDGE).to(output.dtype)
    return F.cross_entropy(output, y) + torch.zeros_like(fallen) / (1 - fallen)
