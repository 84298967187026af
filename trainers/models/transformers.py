"""A small transformer encoder."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Attention(nn.Module):
    """Multi-head self-attention, softmax(q k^T / sqrt(d)) v in each head (Vaswani et al., NIPS 2017, eq. 1).

    Args:
        width: features per position.
        heads: number of heads, which divide the width evenly.
    """

    def __init__(self, width: int, heads: int) -> None:
        """Create the projections."""
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
    """A pre-norm transformer block: attention and a two-layer network, each residual (Xiong et al., ICML 2020).

    Args:
        width: features per position; the network's hidden layer is four times as wide.
        heads: number of attention heads.
        dropout: dropout rate, in [0, 1].
    """

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        """Create attention and network."""
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
    """A transformer encoder with a linear head on the mean over positions.

    Args:
        embedding: maps features or tokens to vectors of size ``width``.
        length: largest length of a sequence.
        outputs: number of outputs.
        blocks: of the encoder.
        width: features per position.
    """

    def __init__(self, embedding: nn.Module, length: int, outputs: int, blocks: list[nn.Module], width: int) -> None:
        """Start with small random position embeddings, shape (length, width)."""
        super().__init__()
        self.embedding = embedding
        self.positions = nn.Parameter(0.02 * torch.randn(length, width))
        self.body = nn.Sequential(*blocks, nn.LayerNorm(width))
        self.head = nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Map features (n, length, features) or int64 tokens (n, length) to outputs (n, outputs)."""
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
    """Return a pre-norm ``Transformer`` for sequences, for classification or regression.

    Attention uses ``F.scaled_dot_product_attention``, for which ``om.model_loss`` selects the kernel that can be
    differentiated twice.

    Args:
        outputs: number of classes or regression targets.
        length: largest length of a sequence.
        features: features per position of float sequences (n, length, features); 0 if ``tokens`` is given.
        tokens: size of the vocabulary of int64 sequences (n, length); 0 if ``features`` is given.
        width: features per position inside the network.
        heads: number of attention heads; they divide the width.
        layers: number of blocks.
        dropout: dropout rate, in [0, 1].

    Raises:
        ValueError: if both or neither of ``features`` and ``tokens`` are given, or the heads do not divide the width.
    """
    if (features > 0) == (tokens > 0):
        raise ValueError(f"features is {features} and tokens {tokens}: give one of them")
    if width % heads:
        raise ValueError(f"width is {width} and heads {heads}: the number of heads must divide the width")
    embedding: nn.Module = nn.Linear(features, width) if features else nn.Embedding(tokens, width)
    blocks: list[nn.Module] = [Block(width, heads, dropout) for _ in range(layers)]
    return Transformer(embedding, length, outputs, blocks, width)
