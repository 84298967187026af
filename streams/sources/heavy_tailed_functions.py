"""Generate tasks from many clusters, a few common and most rare, with noise that has outliers.

Cluster k, from 0, has probability proportional to (k + 1)^-exponent (Zipf's law). The noise follows Student's t
distribution.
"""

from dataclasses import dataclass
from functools import partial
from typing import Annotated

import numpy as np
from annotated_types import Ge, Gt, Le

from online_meta.replay import generator
from online_meta.types import Task
from streams.sources._synthetic import FAMILIES, MAX_PARAMETERS, SPEC, SyntheticSource, sample_task
from streams.spec import TaskSpec, require_same
from streams.types import TaskSource

__all__ = ["SPEC", "Settings", "create_source", "draw_cluster", "make_task"]

CENTRE_DRAWS = 1
"""Separates the random draws of clusters from those of tasks."""


@dataclass(frozen=True)
class Settings:
    """Options of ``[[source]] kind = "heavy_tailed_functions"``.

    Attributes:
        tasks: the number of tasks; by default the stream is endless.
        support: the number of support samples per task.
        query: the number of query samples per task.
        per_second: the largest rate of tasks per second; by default there is no limit.
        noise: the factor of the noise on y, which follows Student's t distribution.
        freedom: the degrees of freedom of the noise. With 2 or fewer its variance is infinite; inf makes it normal.
        clusters: the number of clusters.
        exponent: the exponent of Zipf's law; with 0 all clusters are equally common.
        spread: the fraction of each parameter's range over which the tasks of a cluster are spread, 0 .. 1.
    """

    tasks: Annotated[int, Ge(1)] | None = None
    support: Annotated[int, Ge(1)] = 10
    query: Annotated[int, Ge(1)] = 10
    per_second: Annotated[float, Gt(0)] | None = None
    noise: Annotated[float, Ge(0)] = 0.1
    freedom: Annotated[float, Gt(0)] = 3.0
    clusters: Annotated[int, Ge(1)] = 20
    exponent: Annotated[float, Ge(0)] = 1.2
    spread: Annotated[float, Ge(0), Le(1)] = 0.2


def create_source(settings: Settings, spec: TaskSpec, name: str, seed: int) -> TaskSource | None:
    """Return the stream; raise ``ValueError`` if the run expects other tasks."""
    require_same(spec, SPEC, "heavy_tailed_functions")
    return SyntheticSource(partial(make_task, settings, seed), name, settings.tasks, settings.per_second)


def draw_cluster(settings: Settings, random: np.random.Generator) -> int:
    """Draw a cluster, 0 being the most common; this is the first draw from a task's generator."""
    weights = np.arange(1.0, settings.clusters + 1) ** -settings.exponent
    return int(random.choice(settings.clusters, p=weights / weights.sum()))


def make_task(settings: Settings, seed: int, t: int) -> Task:
    """Generate task t of the stream of a seed, as a pure function of the arguments.

    Returns:
        A task of float32 tensors of shape (support, 1) and (query, 1).
    """
    random = generator(seed, t)
    cluster = draw_cluster(settings, random)
    family = list(FAMILIES.values())[cluster % len(FAMILIES)]
    centre, own = (one.random(MAX_PARAMETERS) for one in (generator(seed, cluster, CENTRE_DRAWS), random))
    shares = (1 - settings.spread) * centre + settings.spread * own
    function = partial(family.value, family.parameters(shares))
    return sample_task(function, random, settings.support, settings.query, settings.noise, settings.freedom)
