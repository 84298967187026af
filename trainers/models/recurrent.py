"""A small recurrent network."""

import torch
from torch import Tensor, nn


class GRULayer(nn.Module):
    """Gated recurrent units (Cho et al., EMNLP 2014) from plain operations: a fused kernel has one derivative only.

    r, z = sigmoid(W x_t + U h + b); n = tanh(W_n x_t + r * (U_n h) + b_n); h' = (1 - z) * n + z * h, as torch.nn.GRU.
    """

    def __init__(self, inputs: int, hidden: int) -> None:
        """Hold the three gates' weights side by side."""
        super().__init__()
        self.hidden = hidden
        self.of_input = nn.Linear(inputs, 3 * hidden)
        self.of_state = nn.Linear(hidden, 3 * hidden)

    def forward(self, x: Tensor) -> Tensor:
        """Map (n, length, inputs) to the states (n, length, hidden); the state before the first is 0."""
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
    """Recurrent layers whose last state a linear head reads."""

    def __init__(self, layers: list[nn.Module], hidden: int, outputs: int) -> None:
        """Run the ``layers`` one after the other."""
        super().__init__()
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(hidden, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Map sequences (n, length, inputs) to outputs (n, outputs)."""
        outputs: Tensor = self.head(self.body(x)[:, -1])
        return outputs


def gru(inputs: int, outputs: int, hidden: int = 32, layers: int = 1, dropout: float = 0.0) -> nn.Module:
    """Return a ``GRU`` for float sequences (n, length, inputs), of any length: classes, or numbers to regress on.

    ``dropout`` is a share in 0..1, applied between layers. Raises ``ValueError`` for fewer layers than one.
    """
    if layers < 1:
        raise ValueError(f"layers is {layers}: a recurrent network has 1 or more")
    body: list[nn.Module] = [GRULayer(inputs, hidden)]
    for _ in range(layers - 1):
        body += [nn.Dropout(dropout), GRULayer(hidden, hidden)]
    return GRU(body, hidden, outputs)
