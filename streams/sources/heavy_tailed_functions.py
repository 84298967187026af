"""A mixture of many clusters of tasks, few common and most rare, with noise that has outliers.

Cluster k, from 0, has the probability (k + 1)^-exponent / sum (Zipf's law), and noise is of Student's t distribution.
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
"""Sets the draws of clusters apart from those of tasks."""


@dataclass(frozen=True)
class Settings:
    """Options of ``[[source]] kind = "heavy_tailed_functions"``.

    Attributes:
        tasks: how many; left out: without end.
        support: samples to adapt on.
        query: samples to be judged on.
        per_second: how many tasks a second at most; left out: as fast as they are taken.
        noise: what Student's t noise on y is multiplied by.
        freedom: its degrees of freedom; of 2 or fewer the variance is infinite; inf: it is normal.
        clusters: how many there are.
        exponent: of Zipf's law; 0: all are as common.
        spread: the share of its family's ranges that the tasks of a cluster are spread over.
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
    """Return the stream; raises ``ValueError`` if the run expects other tasks."""
    require_same(spec, SPEC, "heavy_tailed_functions")
    return SyntheticSource(partial(make_task, settings, seed), name, settings.tasks, settings.per_second)


def draw_cluster(settings: Settings, random: np.random.Generator) -> int:
    """Return a cluster, the most common one being 0; the first draw of a task's generator."""
    weights = np.arange(1.0, settings.clusters + 1) ** -settings.exponent
    return int(random.choice(settings.clusters, p=weights / weights.sum()))


def make_task(settings: Settings, seed: int, t: int) -> Task:
    """Return task t of the stream of a seed, a pure function of its arguments."""
    random = generator(seed, t)
    cluster = draw_cluster(settings, random)
    family = list(FAMILIES.values())[cluster % len(FAMILIES)]
    centre, own = (one.random(MAX_PARAMETERS) for one in (generator(seed, cluster, CENTRE_DRAWS), random))
    shares = (1 - settings.spread) * centre + settings.spread * own
    function = partial(family.value, family.parameters(shares))
    return sample_task(function, random, settings.support, settings.query, settings.noise, settings.freedom)
