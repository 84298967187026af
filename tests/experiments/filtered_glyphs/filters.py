"""Filters that change how a glyph looks, and not what it is: pure functions of images."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

Filter = Callable[[Tensor], Tensor]
"""Images (n, 1, h, w) in 0..1, where 0 is paper and 1 is ink -> images of the same shape and dtype in 0..1."""

EXPOSURE = 0.25
"""The share of its brightness that an image keeps at night."""


def plain(images: Tensor) -> Tensor:
    """Return the images as they are."""
    return images


def blur(images: Tensor) -> Tensor:
    """Return the images convolved with the binomial kernel (1, 4, 6, 4, 1) / 16 along both axes.

    Opposite borders are neighbours, so that the mean of each image stays the same. Sides are at least 2 pixels.
    """
    kernel = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0], dtype=images.dtype, device=images.device) / 16
    along_rows = F.conv2d(F.pad(images, (2, 2, 0, 0), mode="circular"), kernel.reshape(1, 1, 1, 5))
    return F.conv2d(F.pad(along_rows, (0, 0, 2, 2), mode="circular"), kernel.reshape(1, 1, 5, 1))


def night(images: Tensor) -> Tensor:
    """Return the images in the dark: brightness and contrast are ``EXPOSURE`` times what they were."""
    return EXPOSURE * images


def pencil(images: Tensor) -> Tensor:
    """Return a drawing of the edges, dark lines on white paper: 1 - |gradient|, and 0 where the gradient is over 1.

    The gradient is that of central differences, in units of brightness a pixel; border pixels are repeated.
    """
    wide = F.pad(images, (1, 1, 1, 1), mode="replicate")
    across = (wide[..., 1:-1, 2:] - wide[..., 1:-1, :-2]) / 2
    down = (wide[..., 2:, 1:-1] - wide[..., :-2, 1:-1]) / 2
    return 1 - (across.square() + down.square()).sqrt().clamp(max=1)


FILTERS: dict[str, Filter] = {"plain": plain, "blur": blur, "night": night, "pencil": pencil}
"""The filters by name, in the order of the phases (those of Jerfel et al., NeurIPS 2019)."""
