"""Small reference networks, safe to differentiate twice: no running statistics, no in-place edits."""

from itertools import pairwise

import torch
from torch import Tensor, nn


def mlp(inputs: int, outputs: int, hidden: tuple[int, ...] = (40, 40)) -> nn.Module:
    """Return a ReLU network on flattened inputs; hidden=(40, 40) is that of the sinusoid task (Finn et al., 2017)."""
    sizes = [inputs, *hidden]
    layers: list[nn.Module] = [nn.Flatten()]
    for before, after in pairwise(sizes):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(sizes[-1], outputs))


class Conv4(nn.Module):
    """Four 3x3 convolutions of stride 2, each with group normalisation and ReLU, and a linear head.

    The few-shot network of Vinyals et al. (2016) with the strides of Finn et al. (2017). Normalisation
    is per sample, so an answer does not depend on what else is asked with it.
    """

    def __init__(self, channels: int, size: int, ways: int, filters: int, groups: int) -> None:
        """Build for square images of ``size`` pixels a side."""
        super().__init__()
        layers: list[nn.Module] = []
        for inputs in (channels, filters, filters, filters):
            convolution = nn.Conv2d(inputs, filters, kernel_size=3, stride=2, padding=1)
            layers += [convolution, nn.GroupNorm(groups, filters), nn.ReLU()]
            size = (size + 1) // 2
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(filters * size * size, ways)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (n, channels, size, size), float or uint8 in 0..255, to logits (n, ways)."""
        if x.dtype == torch.uint8:
            x = x.to(self.head.weight.dtype) / 255
        features: Tensor = self.body(x)
        logits: Tensor = self.head(features.flatten(1))
        return logits


def conv4(channels: int = 3, size: int = 28, ways: int = 10, filters: int = 32, groups: int = 8) -> nn.Module:
    """Return a ``Conv4`` for square images."""
    return Conv4(channels, size, ways, filters, groups)
