"""Sinusoid regression whose amplitudes drift: y = A sin(x - phase) + noise, A uniform in a window that moves.

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
"""Sets the walk's draws apart from those of tasks."""


@dataclass(frozen=True)
class Settings:
    """Options of ``[[source]] kind = "drifting_sinusoids"``.

    Attributes:
        tasks: how many; left out: without end.
        support: samples to adapt on.
        query: samples to be judged on.
        per_second: how many tasks a second at most; left out: as fast as they are taken.
        noise: the standard deviation of the Gaussian noise on y.
        motion: of the window; "cycle": up and down as a cosine, from the bottom; "walk": at random, back at both ends.
        width: of the window of amplitudes.
        period: after how many tasks a cycle begins again.
        step: the standard deviation of a walk's step, of one task, in units of amplitude.
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
    """Return the stream; raises ``ValueError`` if the run expects other tasks."""
    require_same(spec, SPEC, "drifting_sinusoids")
    return SyntheticSource(partial(make_task, settings, seed), name, settings.tasks, settings.per_second)


def lowest_amplitude(settings: Settings, seed: int, t: int) -> float:
    """Return where the window of task t begins; a pure function, O(log t)."""
    room = HIGH - LOW - settings.width
    if settings.motion == "cycle":
        return LOW + room * (1 - math.cos(2 * math.pi * t / settings.period)) / 2
    return LOW + room * reflect(
        generator(seed, WALK_DRAWS, 0, 1).random() + settings.step / room * random_walk(seed, WALK_DRAWS, t=t)
    )


def make_task(settings: Settings, seed: int, t: int) -> Task:
    """Return task t of the stream of a seed, a pure function."""
    random = generator(seed, t)
    amplitude = lowest_amplitude(settings, seed, t) + settings.width * random.random()
    wave = partial(FAMILIES["sinusoid"].value, np.array([amplitude, random.uniform(0.0, math.pi)]))
    return sample_task(wave, random, settings.support, settings.query, settings.noise)
