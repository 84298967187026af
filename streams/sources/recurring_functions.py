"""Generate recurring clusters of tasks: a spell of sinusoids, then of polynomials, then of sawtooths, repeated.

The setting of Jerfel, Grant, Griffiths, Heller, "Reconciling meta-learning and continual learning with online mixtures
of tasks", NeurIPS 2019, section 5: the tasks of a spell are functions of one family.
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
"""Separates the random draws of spells from those of tasks."""


@dataclass(frozen=True)
class Settings:
    """Options of ``[[source]] kind = "recurring_functions"``.

    Attributes:
        tasks: the number of tasks; by default the stream is endless.
        support: the number of support samples per task.
        query: the number of query samples per task.
        per_second: the largest rate of tasks per second; by default there is no limit.
        noise: the standard deviation of the Gaussian noise on y.
        families: the families of functions; all tasks of a spell belong to one family.
        spell: the number of consecutive tasks of one family.
        order: the order of the families. "turns": as listed, repeatedly. "random": drawn uniformly for each spell.
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
    """Return the stream; raise ``ValueError`` if the run expects other tasks."""
    require_same(spec, SPEC, "recurring_functions")
    return SyntheticSource(partial(make_task, settings, seed), name, settings.tasks, settings.per_second)


def family_of(settings: Settings, seed: int, t: int) -> str:
    """Return the name of the family of task t, as a pure function."""
    spell, many = t // settings.spell, len(settings.families)
    drawn = settings.order == "random"
    return settings.families[int(generator(seed, spell, SPELL_DRAWS).integers(many)) if drawn else spell % many]


def make_task(settings: Settings, seed: int, t: int) -> Task:
    """Generate task t of the stream of a seed, as a pure function; parameters are uniform in the family's ranges.

    Returns:
        A task of float32 tensors of shape (support, 1) and (query, 1).
    """
    random, family = generator(seed, t), FAMILIES[family_of(settings, seed, t)]
    function = partial(family.value, family.parameters(random.random(MAX_PARAMETERS)))
    return sample_task(function, random, settings.support, settings.query, settings.noise)
