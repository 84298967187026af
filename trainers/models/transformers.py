"""A small transformer encoder."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Attention(nn.Module):
    """Multi-head self-attention, softmax(q k^T / sqrt(d)) v in each head (Vaswani et al., NIPS 2017, eq. 1)."""

    def __init__(self, width: int, heads: int) -> None:
        """Split ``width`` between ``heads``."""
        super().__init__()
        self.heads = heads
        self.queries_keys_values = nn.Linear(width, 3 * width)
        self.joined = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map (n, length, width) to the same shape."""
        split = self.queries_keys_values(x).unflatten(-1, (3, self.heads, -1))
        query, key, value = (part.transpose(1, 2) for part in split.unbind(2))
        attended = F.scaled_dot_product_attention(query, key, value)
        joined: Tensor = self.joined(attended.transpose(1, 2).flatten(2))
        return joined


class Block(nn.Module):
    """Attention and a two-layer network, each normalised before and added to what it read (Xiong et al., ICML 2020)."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        """Make the network four times as wide as the block."""
        super().__init__()
        self.attention = nn.Sequential(nn.LayerNorm(width), Attention(width, heads), nn.Dropout(dropout))
        wide = 4 * width
        self.network = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, wide), nn.GELU(), nn.Linear(wide, width), nn.Dropout(dropout)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (n, length, width) to the same shape."""
        x = x + self.attention(x)
        mapped: Tensor = x + self.network(x)
        return mapped


class Transformer(nn.Module):
    """An encoder of ``Block`` s whose mean over the positions a linear head reads."""

    def __init__(self, embedding: nn.Module, length: int, outputs: int, blocks: list[nn.Module], width: int) -> None:
        """Begin with small random positions, shape (length, width)."""
        super().__init__()
        self.embedding = embedding
        self.positions = nn.Parameter(0.02 * torch.randn(length, width))
        self.body = nn.Sequential(*blocks, nn.LayerNorm(width))
        self.head = nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Map features (n, length, features) or int64 tokens (n, length), at most so long, to (n, outputs)."""
        features: Tensor = self.body(self.embedding(x) + self.positions[: x.shape[1]])
        outputs: Tensor = self.head(features.mean(1))
        return outputs


def transformer(
    outputs: int,
    length: int,
    *,
    features: int = 0,
    tokens: int = 0,
    width: int = 32,
    heads: int = 4,
    layers: int = 2,
    dropout: float = 0.0,
) -> nn.Module:
    """Return a pre-norm ``Transformer`` for sequences of at most ``length``: classes, or numbers to regress on.

    Give ``features`` for float sequences (n, length, features), or ``tokens``, the size of the vocabulary, for int64
    ones (n, length). ``dropout`` is a share in 0..1. Attention goes by ``F.scaled_dot_product_attention``, which
    ``om.model_loss`` runs by the kernel that can be differentiated twice.
    Raises ``ValueError`` when both or none of ``features`` and ``tokens`` are given, or heads do not divide the width.
    """
    if (features > 0) == (tokens > 0):
        raise ValueError(f"features is {features} and tokens {tokens}: give one, what a sequence is made of")
    if width % heads:
        raise ValueError(f"width is {width} and heads {heads}: the width is shared evenly between the heads")
    embedding: nn.Module = nn.Linear(features, width) if features else nn.Embedding(tokens, width)
    blocks: list[nn.Module] = [Block(width, heads, dropout) for _ in range(layers)]
    return Transformer(embedding, length, outputs, blocks, width)
