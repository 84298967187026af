"""The multilayer perceptron of regression tasks."""

from itertools import pairwise

import torch
from torch import Tensor, nn


class ContextPerceptron(nn.Sequential):
    """A sequence of layers that reads context parameters, which are separate from its weights, with each input.

    Args:
        context: number of context parameters.
        layers: the layers.
    """

    def __init__(self, context: int, *layers: nn.Module) -> None:
        """Start with a context of zeros, shape (context,)."""
        super().__init__(*layers)
        self.context = nn.Parameter(torch.zeros(context))

    def forward(self, x: Tensor) -> Tensor:
        """Map inputs (n, ...) to outputs (n, outputs); each input is flattened and concatenated with the context."""
        x = x.flatten(1)
        x = torch.cat([x, self.context.expand(len(x), -1)], dim=1)
        for layer in self:
            x = layer(x)
        return x


def mlp(inputs: int, outputs: int, hidden: tuple[int, ...] = (40, 40), context: int = 0) -> nn.Module:
    """Return a multilayer perceptron with ReLU on flattened inputs.

    Args:
        inputs: size of a flattened input.
        outputs: number of outputs.
        hidden: sizes of the hidden layers; (40, 40) is the network of the sinusoid task (Finn et al., 2017).
        context: number of context parameters, named ``context``, which start at zero and are read with each input. With
            ``fast = ["context"]`` only they adapt, which is CAVIA (Zintgraf et al., ICML 2019). 0 for none.

    Raises:
        ValueError: for a negative context.
    """
    if context < 0:
        raise ValueError(f"context is {context}: a network has 0 context parameters or more")
    sizes = [inputs + context, *hidden]
    layers: list[nn.Module] = [nn.Flatten()]
    for before, after in pairwise(sizes):
        layers += [nn.Linear(before, after), nn.ReLU()]
    layers.append(nn.Linear(sizes[-1], outputs))
    return ContextPerceptron(context, *layers) if context else nn.Sequential(*layers)
