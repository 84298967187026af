"""Generate sets of numbers, each drawn from a distribution of its own: how they are spread is to be learned.

The families are those of Edwards & Storkey, "Towards a Neural Statistician", ICLR 2017, section 5.1: exponential,
Gaussian, uniform and Laplacian, with a mean that is uniform in -1 .. 1 and a variance that is uniform in 0.5 .. 2. The
exponential distribution is shifted, so that its mean and its variance are free. The numbers are y, and x is 0.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated, NamedTuple

import numpy as np
import torch
from annotated_types import Ge, Gt

from online_meta.replay import generator
from online_meta.types import Batch, Task
from streams.sources._synthetic import Reals, SyntheticSource
from streams.spec import TaskSpec, require_same
from streams.types import TaskSource

__all__ = ["FAMILIES", "SPEC", "Drawn", "Settings", "create_source", "draw_distribution", "make_task"]

SPEC = TaskSpec(x_shape=(1,), y="real", y_shape=())

FAMILIES: dict[str, Callable[[np.random.Generator, int], Reals]] = {
    "exponential": lambda random, n: random.standard_exponential(n) - 1.0,
    "gaussian": lambda random, n: random.standard_normal(n),
    "uniform": lambda random, n: random.uniform(-math.sqrt(3), math.sqrt(3), n),
    "laplacian": lambda random, n: random.laplace(0.0, math.sqrt(0.5), n),
}
"""Draws of n numbers of each family, with a mean of 0 and a variance of 1."""


class Drawn(NamedTuple):
    """A distribution: its family, and its mean and variance."""

    family: str
    mean: float
    variance: float


@dataclass(frozen=True)
class Settings:
    """Options of ``[[source]] kind = "number_sets"``.

    Attributes:
        tasks: the number of tasks; by default the stream is endless.
        support: the number of support samples per task.
        query: the number of query samples per task.
        per_second: the largest rate of tasks per second; by default there is no limit.
    """

    tasks: Annotated[int, Ge(1)] | None = None
    support: Annotated[int, Ge(1)] = 100
    query: Annotated[int, Ge(1)] = 100
    per_second: Annotated[float, Gt(0)] | None = None


def create_source(settings: Settings, spec: TaskSpec, name: str, seed: int) -> TaskSource | None:
    """Return the stream; raise ``ValueError`` if the run expects other tasks."""
    require_same(spec, SPEC, "number_sets")
    return SyntheticSource(partial(make_task, settings, seed), name, settings.tasks, settings.per_second)


def draw_distribution(random: np.random.Generator) -> Drawn:
    """Draw a distribution, each family with probability 1/4: the first draws from a task's generator."""
    family = list(FAMILIES)[int(random.integers(len(FAMILIES)))]
    return Drawn(family, float(random.uniform(-1.0, 1.0)), float(random.uniform(0.5, 2.0)))


def make_task(settings: Settings, seed: int, t: int) -> Task:
    """Generate task t of the stream of a seed, as a pure function of the arguments.

    Returns:
        A task of float32 tensors: x of shape (n, 1) and y of shape (n,).
    """
    random = generator(seed, t)
    family, mean, variance = draw_distribution(random)
    numbers = mean + math.sqrt(variance) * FAMILIES[family](random, settings.support + settings.query)
    y = torch.from_numpy(numbers.astype(np.float32))
    support, query = y[: settings.support], y[settings.support :]
    return Task(*(Batch(torch.zeros(len(one), 1), one) for one in (support, query)))
