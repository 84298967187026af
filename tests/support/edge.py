"""A loss with an edge: it is not finite for large outputs, so that a model can diverge."""

import torch
from torch import Tensor
from torch.nn import functional as F

EDGE = 6.0


def loss(output: Tensor, y: Tensor) -> Tensor:
    """Return the cross-entropy, or nan if any output is larger than ``EDGE``."""
    is_beyond = (output.abs().max() > EDGE).to(output.dtype)
    return F.cross_entropy(output, y) + torch.zeros_like(is_beyond) / (1 - is_beyond)
