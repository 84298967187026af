"""The convolutional network of few-shot image classification."""

from typing import Literal, get_args

import torch
from torch import Tensor, nn

Norm = Literal["group", "batch", "layer", "instance", "none"]
Pool = Literal["stride", "max"]


class Conv4(nn.Module):
    """A network of four blocks (3x3 convolution, normalisation, ReLU), each halving the side, and a linear head.

    It is the few-shot network of Vinyals et al. (NIPS 2016), which halves by max-pooling, or its variant with strides
    by Finn et al. (ICML 2017). All normalisations except batch normalisation are per sample, so that a prediction does
    not depend on the other samples of its batch.

    Args:
        blocks: layers of each block.
        filters: number of feature maps of the last block.
        size: side of these maps, in pixels.
        ways: number of classes.
    """

    def __init__(self, blocks: list[list[nn.Module]], filters: int, size: int, ways: int) -> None:
        """Join the blocks and add the head."""
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
        """Map images (n, channels, side, side) to the feature maps of the last block (n, filters, size, size)."""
        maps: Tensor = self.body(x)
        return maps


class ContextConv4(Conv4):
    """A ``Conv4`` whose third block is modulated by context parameters, which are separate from the network's weights.

    The maps m of the block, before ReLU, become (1 + gamma) m + beta, where gamma and beta are a linear function of the
    context (FiLM: Perez et al., AAAI 2018), as in CAVIA (Zintgraf et al., ICML 2019).

    Args:
        context: number of context parameters.
        blocks: layers of each block.
        filters: number of feature maps of each block.
        size: side of the last maps, in pixels.
        ways: number of classes.
    """

    def __init__(self, context: int, blocks: list[list[nn.Module]], filters: int, size: int, ways: int) -> None:
        """Start with a context of zeros, shape (context,), which modulates nothing."""
        super().__init__(blocks, filters, size, ways)
        self.context = nn.Parameter(torch.zeros(context))
        self.film = nn.Linear(context, 2 * filters)
        nn.init.zeros_(self.film.bias)
        self._modulated = [index for index, layer in enumerate(self.body) if isinstance(layer, nn.ReLU)][2]

    def features(self, x: Tensor) -> Tensor:
        """Map images (n, channels, side, side) to the feature maps of the last block (n, filters, size, size)."""
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
    """Return a ``Conv4`` for square images.

    Args:
        channels: of the images.
        size: side of the images, in pixels.
        ways: number of classes.
        filters: feature maps of each block.
        groups: number of groups, for ``norm`` = "group".
        norm: "group", "batch" (with the statistics of the batch itself, in training and in prediction: the transductive
            form in the MAML literature), "layer", "instance" or "none".
        pool: how a block halves the side: "stride" (stride 2 of its convolution, rounding up) or "max" (max-pooling
            over 2x2, rounding down).
        context: number of context parameters, named ``context``, for CAVIA with ``fast = ["context"]``; 0 for none.

    Raises:
        ValueError: for an unknown norm or pool, a negative context, or images that "max" cannot halve four times.
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
