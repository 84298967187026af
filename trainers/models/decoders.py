"""The decoders of neural processes that look up support samples: attention, and a transformer."""

import math

import torch
from torch import Tensor, nn

from trainers.models.perceptron import mlp


class AttentiveDecoder(nn.Module):
    """A perceptron that reads, with each input, what it looks up for it: softmax(q(x) k^T / sqrt(width) + b) v.

    The weights ``keys`` (m, width + 1) have the keys k in their first columns and the biases b in the last one, and
    ``values`` (m, width) the values v. The inner rule ``encode`` with ``attention`` adds a row for each support sample.

    Args:
        inputs: size of a flattened input.
        outputs: number of outputs.
        hidden: sizes of the hidden layers.
        width: of keys and values.
        context: number of context parameters.
    """

    def __init__(self, inputs: int, outputs: int, hidden: tuple[int, ...], width: int, context: int) -> None:
        """Start with one key and one value of zeros, which are looked up before any data."""
        super().__init__()
        self.keys = nn.Parameter(torch.zeros(1, width + 1))
        self.values = nn.Parameter(torch.zeros(1, width))
        self.query = nn.Sequential(nn.Linear(inputs, width), nn.GELU(), nn.Linear(width, width))
        self.network = mlp(inputs + width, outputs, hidden, context)

    def forward(self, x: Tensor) -> Tensor:
        """Map inputs (n, ...) to outputs (n, outputs); each input is flattened."""
        x = x.flatten(1)
        output: Tensor = self.network(torch.cat([x, look_up(self.query(x), self.keys, self.values)], dim=1))
        return output


def look_up(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Return softmax(q k^T / sqrt(d) + b) v (Vaswani et al., NIPS 2017, eq. 1), with a bias for each key.

    Args:
        queries: (n, d).
        keys: (m, d + 1), with the biases in the last column.
        values: (m, v).

    Returns:
        What is looked up, (n, v).
    """
    logits = queries @ keys[:, :-1].T / math.sqrt(queries.shape[1]) + keys[:, -1]
    return logits.softmax(1) @ values


def attentive_decoder(
    inputs: int, outputs: int, hidden: tuple[int, ...] = (64, 64), width: int = 64, context: int = 0
) -> nn.Module:
    """Return the decoder of an attentive neural process (Kim et al., ICLR 2019), with ReLU on flattened inputs.

    Use it with ``rule = "encode"``, ``options = { attention = true }`` and ``fast = ["keys", "values"]``.

    Args:
        inputs: size of a flattened input.
        outputs: number of outputs; for ``loss = "gaussian"``, two for each number of y.
        hidden: sizes of the hidden layers.
        width: of keys and values, at least 1.
        context: number of context parameters, named ``network.context``, which are read with each input; with
            ``options = { attention = true, latent = true }`` and ``fast = ["network.context", "keys", "values"]`` they
            are the latent variable. 0 for none.

    Raises:
        ValueError: for a width below 1, or a negative context.
    """
    if width < 1:
        raise ValueError(f"width is {width}: keys have 1 number or more")
    return AttentiveDecoder(inputs, outputs, hidden, width, context)


class ContextBlock(nn.Module):
    """A pre-norm transformer block in which all tokens look up the first ones only (Xiong et al., ICML 2020).

    Args:
        width: numbers of a token; the hidden layer is four times as wide.
        heads: number of attention heads.
    """

    def __init__(self, width: int, heads: int) -> None:
        """Create attention and network."""
        super().__init__()
        self.heads = heads
        self.norm, self.projections, self.joined = (
            nn.LayerNorm(width),
            nn.Linear(width, 3 * width),
            nn.Linear(width, width),
        )
        self.network = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, tokens: Tensor, bias: Tensor) -> Tensor:
        """Map tokens (m + n, width) to the same shape; the first m are looked up, with a ``bias`` (m,) each."""
        split = self.projections(self.norm(tokens)).unflatten(-1, (3, self.heads, -1))
        query, key, value = (part.transpose(0, 1) for part in split.unbind(1))
        key, value = key[:, : len(bias)], value[:, : len(bias)]
        attention = (query @ key.transpose(1, 2) / math.sqrt(query.shape[-1]) + bias).softmax(-1)
        tokens = tokens + self.joined((attention @ value).transpose(0, 1).flatten(1))
        mapped: Tensor = tokens + self.network(tokens)
        return mapped


class InContextTransformer(nn.Module):
    """A transformer whose tokens are the support samples, in the weights ``rows``, and the query inputs.

    Support samples look each other up, and query inputs look up the support samples. A row has x and y, in ``features``
    places each, and the logarithm of its weight.

    Args:
        inputs: size of a flattened input.
        outputs: number of outputs.
        features: places of x, and of y, in a row.
        width: numbers of a token.
        heads: number of attention heads.
        layers: number of blocks.
    """

    def __init__(self, inputs: int, outputs: int, features: int, width: int, heads: int, layers: int) -> None:
        """Start with one row of zeros, which is looked up before any data."""
        super().__init__()
        self.rows = nn.Parameter(torch.zeros(1, 2 * features + 1))
        self.row, self.query = nn.Linear(2 * features, width), nn.Linear(inputs, width)
        self.blocks = nn.ModuleList([ContextBlock(width, heads) for _ in range(layers)])
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Map inputs (n, ...) to outputs (n, outputs); each input is flattened."""
        tokens = torch.cat([self.row(self.rows[:, :-1]), self.query(x.flatten(1))])
        for block in self.blocks:
            tokens = block(tokens, self.rows[:, -1])
        outputs: Tensor = self.head(tokens[len(self.rows) :])
        return outputs


def in_context_transformer(
    inputs: int, outputs: int, features: int = 16, width: int = 64, heads: int = 4, layers: int = 3
) -> nn.Module:
    """Return a transformer that learns a task from the support samples in its context, without a step.

    It is the diagonal transformer neural process (Nguyen & Grover, ICML 2022) and the architecture of prior-fitted
    networks (Müller et al., ICLR 2022). Use it with ``rule = "encode"``, ``options = { in_context = true }``,
    ``fast = ["rows"]`` and ``steps = 0``.

    Args:
        inputs: size of a flattened input.
        outputs: number of outputs; for ``loss = "gaussian"``, two for each number of y.
        features: places of x, and of y, in a row: that of the rule.
        width: numbers of a token, which ``heads`` divides.
        heads: number of attention heads.
        layers: number of blocks, at least 1.

    Raises:
        ValueError: if a number is below 1, or the heads do not divide the width.
    """
    if min(features, width, heads, layers) < 1 or width % heads:
        raise ValueError(
            f"features is {features}, width {width}, heads {heads} and layers {layers}: they are 1 or more, and the "
            "number of heads divides the width"
        )
    return InContextTransformer(inputs, outputs, features, width, heads, layers)
