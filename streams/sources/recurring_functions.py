"""Clusters of tasks that come in spells and return: sinusoids, then polynomials, then sawtooths, and again.

The setting of Jerfel, Grant, Griffiths, Heller, "Reconciling meta-learning and continual learning with online mixtures
of tasks", NeurIPS 2019, section 5: tasks of one family of functions follow each other until another takes its place.
"""

from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal

from annotated_types import Ge, Gt, MinLen

from online_meta.replay import generator
from online_meta.types import Task
from streams.sources._synthetic import FAMILIES, MAX_PARAMETERS, SPEC, SyntheticSource, sample_task
from streams.spec import TaskSpec, require_same
from streams.types import TaskSource

__all__ = ["SPEC", "Settings", "create_source", "family_of", "make_task"]

SPELL_DRAWS = 1
"""Sets the draws of spells apart from those of tasks."""


@dataclass(frozen=True)
class Settings:
    """Options of ``[[source]] kind = "recurring_functions"``.

    Attributes:
        tasks: how many; left out: without end.
        support: samples to adapt on.
        query: samples to be judged on.
        per_second: how many tasks a second at most; left out: as fast as they are taken.
        noise: the standard deviation of the Gaussian noise on y.
        families: what the tasks of a spell are functions of.
        spell: how many tasks of a family follow each other.
        order: of the families; "turns": as they are listed, over and over; "random": each spell's is drawn, evenly.
    """

    tasks: Annotated[int, Ge(1)] | None = None
    support: Annotated[int, Ge(1)] = 10
    query: Annotated[int, Ge(1)] = 10
    per_second: Annotated[float, Gt(0)] | None = None
    noise: Annotated[float, Ge(0)] = 0.0
    families: Annotated[tuple[Literal["sinusoid", "line", "quadratic", "cubic", "sawtooth"], ...], MinLen(1)] = (
        "sinusoid",
        "quadratic",
        "sawtooth",
    )
    spell: Annotated[int, Ge(1)] = 50
    order: Literal["turns", "random"] = "turns"


def create_source(settings: Settings, spec: TaskSpec, name: str, seed: int) -> TaskSource | None:
    """Return the stream; raises ``ValueError`` if the run expects other tasks."""
    require_same(spec, SPEC, "recurring_functions")
    return SyntheticSource(partial(make_task, settings, seed), name, settings.tasks, settings.per_second)


def family_of(settings: Settings, seed: int, t: int) -> str:
    """Return the family of task t; a pure function."""
    spell, many = t // settings.spell, len(settings.families)
    drawn = settings.order == "random"
    return settings.families[int(generator(seed, spell, SPELL_DRAWS).integers(many)) if drawn else spell % many]


def make_task(settings: Settings, seed: int, t: int) -> Task:
    """Return task t of the stream of a seed, a pure function; the parameters are uniform in the family's ranges."""
    random, family = generator(seed, t), FAMILIES[family_of(settings, seed, t)]
    function = partial(family.value, family.parameters(random.random(MAX_PARAMETERS)))
    return sample_task(function, random, settings.support, settings.query, settings.noise)
