"""Generate sinusoid regression with drifting amplitudes: y = A sin(x - phase) + noise, A uniform in a moving window.

The window lies within 0.1 .. 5, the amplitudes of Finn et al., ICML 2017; phase is uniform in 0 .. pi, x in -5 .. 5.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal

import numpy as np
from annotated_types import Ge, Gt, Lt

from online_meta.replay import generator
from online_meta.types import Task
from streams.sources._synthetic import FAMILIES, SPEC, SyntheticSource, random_walk, reflect, sample_task
from streams.spec import TaskSpec, require_same
from streams.types import TaskSource

__all__ = ["SPEC", "Settings", "create_source", "lowest_amplitude", "make_task"]

LOW, HIGH = FAMILIES["sinusoid"].low[0], FAMILIES["sinusoid"].high[0]
WALK_DRAWS = 1
"""Separates the random draws of the walk from those of tasks."""


@dataclass(frozen=True)
class Settings:
    """Options of ``[[source]] kind = "drifting_sinusoids"``.

    Attributes:
        tasks: the number of tasks; by default the stream is endless.
        support: the number of support samples per task.
        query: the number of query samples per task.
        per_second: the largest rate of tasks per second; by default there is no limit.
        noise: the standard deviation of the Gaussian noise on y.
        motion: how the window moves. "cycle": up and down as a cosine, starting at the bottom. "walk": as a random walk
            that is reflected at both ends.
        width: the width of the window of amplitudes.
        period: the number of tasks in one cycle.
        step: the standard deviation of the walk's step per task, in units of amplitude.
    """

    tasks: Annotated[int, Ge(1)] | None = None
    support: Annotated[int, Ge(1)] = 10
    query: Annotated[int, Ge(1)] = 10
    per_second: Annotated[float, Gt(0)] | None = None
    noise: Annotated[float, Ge(0)] = 0.0
    motion: Literal["cycle", "walk"] = "cycle"
    width: Annotated[float, Ge(0), Lt(HIGH - LOW)] = 0.5
    period: Annotated[float, Gt(0)] = 500.0
    step: Annotated[float, Ge(0)] = 0.1


def create_source(settings: Settings, spec: TaskSpec, name: str, seed: int) -> TaskSource | None:
    """Return the stream; raise ``ValueError`` if the run expects other tasks."""
    require_same(spec, SPEC, "drifting_sinusoids")
    return SyntheticSource(partial(make_task, settings, seed), name, settings.tasks, settings.per_second)


def lowest_amplitude(settings: Settings, seed: int, t: int) -> float:
    """Return the lower end of the window of task t, as a pure function in O(log t) time."""
    room = HIGH - LOW - settings.width
    if settings.motion == "cycle":
        return LOW + room * (1 - math.cos(2 * math.pi * t / settings.period)) / 2
    return LOW + room * reflect(
        generator(seed, WALK_DRAWS, 0, 1).random() + settings.step / room * random_walk(seed, WALK_DRAWS, t=t)
    )


def make_task(settings: Settings, seed: int, t: int) -> Task:
    """Generate task t of the stream of a seed, as a pure function.

    Returns:
        A task of float32 tensors of shape (support, 1) and (query, 1).
    """
    random = generator(seed, t)
    amplitude = lowest_amplitude(settings, seed, t) + settings.width * random.random()
    wave = partial(FAMILIES["sinusoid"].value, np.array([amplitude, random.uniform(0.0, math.pi)]))
    return sample_task(wave, random, settings.support, settings.query, settings.noise)
