"""The network of the tables of digits: a perceptron that sees images without their mean."""

from collections.abc import Sequence

from torch import Tensor, nn

from trainers.models import mlp


class Centred(nn.Module):
    """A network that sees each channel of an image without its mean.

    So the colour of the ground matters less, and an inverted image is the negative of what it was.
    """

    def __init__(self, network: nn.Module) -> None:
        """Put the images through ``network``."""
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        """Map images (n, ..., height, width) of 0..255 to logits (n, ways)."""
        shades = images.to(next(self.network.parameters()).dtype) / 255
        logits: Tensor = self.network(shades - shades.mean((-2, -1), keepdim=True))
        return logits


def centred_mlp(inputs: int, ways: int, hidden: Sequence[int]) -> nn.Module:
    """Return a perceptron of images of so many numbers, with layers of ``hidden`` units."""
    return Centred(mlp(inputs, ways, tuple(hidden)))
