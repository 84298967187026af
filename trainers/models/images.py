"""The network of the few-shot image tasks."""

from typing import Literal, get_args

import torch
from torch import Tensor, nn

Norm = Literal["group", "batch", "layer", "instance", "none"]
Pool = Literal["stride", "max"]


class Conv4(nn.Module):
    """Four blocks of a 3x3 convolution, a normalisation and ReLU, each halving the side, and a linear head.

    The few-shot network of Vinyals et al. (NIPS 2016), which halves by max-pooling, or with the strides of Finn et
    al. (ICML 2017). Every normalisation but that of the batch is per sample, so an answer does not depend on what
    else is asked with it.
    """

    def __init__(self, blocks: list[list[nn.Module]], filters: int, size: int, ways: int) -> None:
        """Join the ``blocks``, behind which there are ``filters`` maps of ``size`` pixels a side."""
        super().__init__()
        self.body = nn.Sequential(*(layer for block in blocks for layer in block))
        self.head = nn.Linear(filters * size * size, ways)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (n, channels, size, size), float or uint8 in 0..255, to logits (n, ways)."""
        if x.dtype == torch.uint8:
            x = x.to(self.head.weight.dtype) / 255
        logits: Tensor = self.head(self.features(x).flatten(1))
        return logits

    def features(self, x: Tensor) -> Tensor:
        """Map images to the maps behind the last block."""
        maps: Tensor = self.body(x)
        return maps


class ContextConv4(Conv4):
    """A ``Conv4`` whose third block a ``context`` modulates: parameters of the task, apart from those of the network.

    Its maps m, before ReLU, become (1 + gamma) m + beta, gamma and beta a linear function of the context (FiLM: Perez
    et al., AAAI 2018), as in CAVIA (Zintgraf et al., ICML 2019).
    """

    def __init__(self, context: int, blocks: list[list[nn.Module]], filters: int, size: int, ways: int) -> None:
        """Begin with a context of zeros, shape (context,), so with the network as it would be without."""
        super().__init__(blocks, filters, size, ways)
        self.context = nn.Parameter(torch.zeros(context))
        self.film = nn.Linear(context, 2 * filters)
        nn.init.zeros_(self.film.bias)
        self._modulated = [index for index, layer in enumerate(self.body) if isinstance(layer, nn.ReLU)][2]

    def features(self, x: Tensor) -> Tensor:
        """Map images to the maps behind the last block."""
        gamma, beta = self.film(self.context)[:, None, None].chunk(2)
        for index, layer in enumerate(self.body):
            if index == self._modulated:
                x = (1 + gamma) * x + beta
            x = layer(x)
        return x


def conv4(
    channels: int = 3,
    size: int = 28,
    ways: int = 10,
    filters: int = 32,
    groups: int = 8,
    norm: Norm = "group",
    pool: Pool = "stride",
    context: int = 0,
) -> nn.Module:
    """Return a ``Conv4`` for square images of ``size`` pixels a side.

    ``norm`` is "group" (of ``groups`` groups), "batch" (the statistics of the batch itself, in learning and in
    answering: the transductive form of the MAML literature), "layer", "instance" or "none". ``pool`` is how a block
    halves the side: "stride" 2 of its convolution (rounding up), or "max" over 2x2 (rounding down). With a ``context``
    above 0 it has so many parameters called ``context``, for CAVIA: ``fast = ["context"]``. Raises ``ValueError`` for
    another norm or pool, a negative context, and for images too small to be halved four times by "max".
    """
    for option, value, known in (("norm", norm, get_args(Norm)), ("pool", pool, get_args(Pool))):
        if value not in known:
            raise ValueError(f"{option} is {value!r}: it is one of {', '.join(known)}")
    if pool == "max" and size < 16:
        raise ValueError(f"size is {size}: pool = 'max' halves the side four times, so it takes 16 pixels or more")
    blocks = []
    side = size
    for inputs in (channels, filters, filters, filters):
        halved = (side + 1) // 2 if pool == "stride" else side // 2
        convolution = nn.Conv2d(inputs, filters, kernel_size=3, stride=2 if pool == "stride" else 1, padding=1)
        layers = [convolution, *_norm(norm, filters, groups, halved if pool == "stride" else side), nn.ReLU()]
        blocks.append(layers if pool == "stride" else [*layers, nn.MaxPool2d(2)])
        side = halved
    if context < 0:
        raise ValueError(f"context is {context}: a network has 0 context parameters or more")
    return ContextConv4(context, blocks, filters, side, ways) if context else Conv4(blocks, filters, side, ways)


def _norm(norm: Norm, filters: int, groups: int, side: int) -> list[nn.Module]:
    """Return the normalisation of feature maps (n, filters, side, side): a layer, or none."""
    if norm == "group":
        return [nn.GroupNorm(groups, filters)]
    if norm == "batch":
        return [nn.BatchNorm2d(filters, track_running_stats=False)]
    if norm == "layer":
        return [nn.LayerNorm([filters, side, side])]
    return [nn.InstanceNorm2d(filters, affine=True)] if norm == "instance" else []
