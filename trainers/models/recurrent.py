"""A small recurrent network (GRU)."""

import torch
from torch import Tensor, nn


class GRULayer(nn.Module):
    """A layer of gated recurrent units (Cho et al., EMNLP 2014), with the equations of ``torch.nn.GRU``.

    r, z = sigmoid(W x_t + U h + b); n = tanh(W_n x_t + r * (U_n h) + b_n); h' = (1 - z) * n + z * h. It uses plain
    operations, because a fused kernel can be differentiated only once.

    Args:
        inputs: features of an input.
        hidden: size of the state.
    """

    def __init__(self, inputs: int, hidden: int) -> None:
        """Create the weights of r, z and n as one matrix each for input and state."""
        super().__init__()
        self.hidden = hidden
        self.of_input = nn.Linear(inputs, 3 * hidden)
        self.of_state = nn.Linear(hidden, 3 * hidden)

    def forward(self, x: Tensor) -> Tensor:
        """Map inputs (n, length, inputs) to states (n, length, hidden); the initial state is 0."""
        driven = self.of_input(x)
        state = driven.new_zeros(len(x), self.hidden)
        states = []
        for now in driven.unbind(1):
            reset, keep, new = now.chunk(3, -1)
            of_reset, of_keep, of_new = self.of_state(state).chunk(3, -1)
            keep = torch.sigmoid(keep + of_keep)
            candidate = torch.tanh(new + torch.sigmoid(reset + of_reset) * of_new)
            state = (1 - keep) * candidate + keep * state
            states.append(state)
        return torch.stack(states, 1)


class GRU(nn.Module):
    """A stack of recurrent layers with a linear head on the last state.

    Args:
        layers: applied one after the other.
        hidden: size of the state.
        outputs: number of outputs.
    """

    def __init__(self, layers: list[nn.Module], hidden: int, outputs: int) -> None:
        """Join the layers and add the head."""
        super().__init__()
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(hidden, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Map sequences (n, length, inputs) to outputs (n, outputs)."""
        outputs: Tensor = self.head(self.body(x)[:, -1])
        return outputs


def gru(inputs: int, outputs: int, hidden: int = 32, layers: int = 1, dropout: float = 0.0) -> nn.Module:
    """Return a ``GRU`` for float sequences (n, length, inputs) of any length, for classification or regression.

    Args:
        inputs: features of an input.
        outputs: number of classes or regression targets.
        hidden: size of the state.
        layers: number of layers, 1 or more.
        dropout: dropout rate between layers, in [0, 1].

    Raises:
        ValueError: for fewer than one layer.
    """
    if layers < 1:
        raise ValueError(f"layers is {layers}: a recurrent network has 1 or more")
    body: list[nn.Module] = [GRULayer(inputs, hidden)]
    for _ in range(layers - 1):
        body += [nn.Dropout(dropout), GRULayer(hidden, hidden)]
    return GRU(body, hidden, outputs)
