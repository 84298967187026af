"""The networks of the benchmark in plain torch; ``jax_networks.py`` has the same under the same parameter names."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CRITERIA: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"mse": F.mse_loss, "cross_entropy": F.cross_entropy}


def sinusoid_mlp() -> nn.Module:
    """1-40-40-1 with ReLU (Finn et al., ICML 2017, section 5.1)."""
    return nn.Sequential(nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 1))


def conv4(ways: int, filters: int = 64, side: int = 84, groups: int | None = None) -> nn.Module:
    """Four blocks of convolution, BatchNorm by batch statistics, ReLU and pooling (Vinyals et al., NIPS 2016).

    With a number of ``groups``, GroupNorm takes the place of BatchNorm.
    """
    layers: list[nn.Module] = []
    for channels in (3, filters, filters, filters):
        norm = nn.GroupNorm(groups, filters) if groups else nn.BatchNorm2d(filters, track_running_stats=False)
        layers += [nn.Conv2d(channels, filters, 3, padding=1), norm, nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(filters * (side // 16) ** 2, ways))


class Block(nn.Module):
    """Attention and a two-layer perceptron, each after a LayerNorm and with a residual connection."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.before_attention, self.before_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mix, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        size, length, width = x.shape
        mixed = self.mix(self.before_attention(x)).view(size, length, 3, self.heads, width // self.heads)
        query, key, value = mixed.permute(2, 0, 3, 1, 4).unbind(0)
        attended = F.scaled_dot_product_attention(query, key, value)
        x = x + self.out(attended.transpose(1, 2).reshape(size, length, width))
        added: Tensor = self.down(F.gelu(self.up(self.before_mlp(x))))
        return x + added


class Transformer(nn.Module):
    """(n, length, features) -> (n, 1): a linear head on the mean over the positions of the last block."""

    def __init__(self, features: int, length: int, width: int, heads: int, hidden: int, layers: int) -> None:
        super().__init__()
        self.embed = nn.Linear(features, width)
        self.position = nn.Parameter(0.02 * torch.randn(length, width))
        self.blocks = nn.ModuleList(Block(width, heads, hidden) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x) + self.position
        for block in self.blocks:
            x = block(x)
        predicted: Tensor = self.head(self.norm(x).mean(1))
        return predicted
