"""Generate sinusoid regression, the smallest few-shot problem: y = A sin(x - phase) + noise.

Finn, Abbeel, Levine, "Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks", ICML 2017, section 5.1:
A uniform in 0.1 .. 5, phase uniform in 0 .. pi, x uniform in -5 .. 5.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Annotated

import numpy as np
from annotated_types import Ge, Gt

from online_meta.replay import generator
from online_meta.types import Task
from streams.sources._synthetic import FAMILIES, SPEC, SyntheticSource, sample_task
from streams.spec import TaskSpec, require_same
from streams.types import TaskSource

__all__ = ["SPEC", "Settings", "create_source", "make_task"]


@dataclass(frozen=True)
class Settings:
    """Options of ``[[source]] kind = "sinusoid"``.

    Attributes:
        tasks: the number of tasks; by default the stream is endless.
        support: the number of support samples per task.
        query: the number of query samples per task.
        per_second: the largest rate of tasks per second; by default there is no limit.
        noise: the standard deviation of the Gaussian noise on y.
    """

    tasks: Annotated[int, Ge(1)] | None = None
    support: Annotated[int, Ge(1)] = 10
    query: Annotated[int, Ge(1)] = 10
    per_second: Annotated[float, Gt(0)] | None = None
    noise: Annotated[float, Ge(0)] = 0.0


def create_source(settings: Settings, spec: TaskSpec, name: str, seed: int) -> TaskSource | None:
    """Return the stream; raise ``ValueError`` if the run expects other tasks."""
    require_same(spec, SPEC, "sinusoid")
    make = partial(_make, seed, settings)
    return SyntheticSource(make, name, settings.tasks, settings.per_second)


def _make(seed: int, settings: Settings, t: int) -> Task:
    return make_task(seed, t, settings.support, settings.query, settings.noise)


def make_task(seed: int, t: int, support: int, query: int, noise: float = 0.0) -> Task:
    """Generate task t of the stream of a seed, as a pure function of the arguments.

    Args:
        seed: the seed of the stream, 0 or more.
        t: the number of the task, 0 or more.
        support: the number of support samples.
        query: the number of query samples.
        noise: the standard deviation of the noise on y.

    Returns:
        A task of float32 tensors of shape (support, 1) and (query, 1).
    """
    random = generator(seed, t)
    function = partial(FAMILIES["sinusoid"].value, np.array([random.uniform(0.1, 5.0), random.uniform(0.0, math.pi)]))
    return sample_task(function, random, support, query, noise)
