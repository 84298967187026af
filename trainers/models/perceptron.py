"""The network of the regression tasks."""

from itertools import pairwise

import torch
from torch import Tensor, nn


class ContextPerceptron(nn.Sequential):
    """Layers that read a ``context`` beside each input: parameters of the task, apart from those of the network."""

    def __init__(self, context: int, *layers: nn.Module) -> None:
        """Begin with a context of zeros, shape (context,)."""
        super().__init__(*layers)
        self.context = nn.Parameter(torch.zeros(context))

    def forward(self, x: Tensor) -> Tensor:
        """Map inputs (n, ...), flattened and each followed by the context, to outputs (n, outputs)."""
        x = x.flatten(1)
        x = torch.cat([x, self.context.expand(len(x), -1)], dim=1)
        for layer in self:
            x = layer(x)
        return x


def mlp(inputs: int, outputs: int, hidden: tuple[int, ...] = (40, 40), context: int = 0) -> nn.Module:
    """Return a ReLU network on flattened inputs; hidden=(40, 40) is that of the sinusoid task (Finn et al., 2017).

    With a ``context`` above 0 it has so many parameters more, called ``context``, that begin at zero and are read
    beside the inputs: with ``fast = ["context"]`` they alone adapt, which is CAVIA (Zintgraf et al., ICML 2019).
    Raises ``ValueError`` for a negative context.
    """
    if context < 0:
        raise ValueError(f"context is {context}: a network has 0 context parameters or more")
    sizes = [inputs + context, *hidden]
    layers: list[nn.Module] = [nn.Flatten()]
    for before, after in pairwise(sizes):
        layers += [nn.Linear(before, after), nn.ReLU()]
    layers.append(nn.Linear(sizes[-1], outputs))
    return ContextPerceptron(context, *layers) if context else nn.Sequential(*layers)
