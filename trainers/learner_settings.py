"""The learners of a run: which there are, and the settings that each of them plays with."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Protocol, TypeVar

from online_meta.learners.pool import NAME
from online_meta.registry import nearest
from online_meta.regret.ledger import MAIN_LEARNER
from trainers.settings import InnerSettings, LearnerSettings, MetaSettings, PoolSettings, RegretSettings

POOL = NAME
"""What the pool of a run is called."""
RUN_KEYS = ("max_rounds_per_update", "idle_updates", "max_skipped", "when_diverged")
"""Keys of [meta] that count for the whole run, so that no learner has values of its own."""
STEPPING_KEYS = ("optimizer", "optimizer_options", "lr", "clip_norm", "schedule", "schedule_options")
"""Keys of [meta] that say how meta-parameters are stepped."""
OPTIONS_OF = {
    "rule": "options",
    "posterior": "posterior_options",
    "gradient": "options",
    "optimizer": "optimizer_options",
    "schedule": "schedule_options",
    "replay": "replay_options",
}
"""The keys that name an entry with options, and the key of the options."""


class HasLearners(Protocol):
    """A whole configuration, or the part of it that the trainers need."""

    @property
    def learner(self) -> tuple[LearnerSettings, ...]:
        """The ``[[learner]]`` tables."""

    @property
    def inner(self) -> InnerSettings:
        """The section [inner]."""

    @property
    def meta(self) -> MetaSettings:
        """The section [meta]."""

    @property
    def regret(self) -> RegretSettings:
        """The section [regret]."""

    @property
    def pool(self) -> PoolSettings:
        """The section [pool]."""


Settings = TypeVar("Settings", bound=HasLearners)
Section = TypeVar("Section", InnerSettings, MetaSettings)


def list_learners(settings: HasLearners) -> tuple[LearnerSettings, ...]:
    """Return the learners of a run; the first one leads.

    They are the ``[[learner]]`` tables, or FTML if there are none, and then the ``baselines`` of [regret].
    """
    options = settings.regret.options
    first = settings.learner or (LearnerSettings(MAIN_LEARNER, MAIN_LEARNER, options=options.get(MAIN_LEARNER, {})),)
    others = (LearnerSettings(name, name, options=options.get(name, {})) for name in settings.regret.baselines)
    return (*first, *others)


def override_settings(settings: Settings, learner: LearnerSettings) -> Settings:
    """Return the settings with the values that a learner has of its own in [inner] and [meta].

    Another name of a rule, an estimator, an optimizer, a schedule or a policy comes without the options of the run's.
    Raises ``ValueError`` for a key that counts for the whole run.
    """
    if not (learner.inner or learner.meta):
        return settings
    for key in find_run_keys(learner):
        raise ValueError(f"learner {learner.name!r}: {key} counts for the whole run: set it in [meta]")
    own = {"inner": _override(settings.inner, learner.inner), "meta": _override(settings.meta, learner.meta)}
    changed: Settings = dataclasses.replace(settings, **own)  # type: ignore[type-var]  # both are dataclasses
    return changed


def _override(section: Section, own: dict[str, object]) -> Section:
    renamed = [key for key in OPTIONS_OF.keys() & own.keys() if own[key] != getattr(section, key)]
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in own.items()}
    return dataclasses.replace(section, **{**{OPTIONS_OF[key]: {} for key in renamed}, **values})  # type: ignore[arg-type]


def find_run_keys(learner: LearnerSettings) -> Iterator[str]:
    """Yield the keys of a learner's [meta] that count for the whole run."""
    return (key for key in RUN_KEYS if key in learner.meta)


def lead_settings(settings: Settings) -> Settings:
    """Return the settings that the leading learner plays with."""
    return override_settings(settings, list_learners(settings)[0])


def has_pool(settings: HasLearners) -> bool:
    """Return whether a pool plays."""
    return settings.pool.aggregation != "none"


def list_players(settings: HasLearners) -> tuple[str, ...]:
    """Return the names of all that play: the learners, the leading one first, and then the pool if there is one."""
    return (*(learner.name for learner in list_learners(settings)), *([POOL] if has_pool(settings) else []))


def find_player(settings: HasLearners, answer: str | None) -> str:
    """Return the name of the learner that gives an answer, "NAME" or "NAME@STEPS".

    For None it is the pool, or without a pool the learner that leads. Raises ``ValueError`` if there is none of this
    name.
    """
    players = list_players(settings)
    if answer is None:
        return POOL if has_pool(settings) else players[0]
    name = answer.partition("@")[0]
    if name not in players:
        raise ValueError(f"no learner is called {name!r}: {nearest(name, players)}")
    return name


def find_repeated_names(names: Sequence[str]) -> list[str]:
    """Return the names that more than one learner has."""
    return sorted({name for name in names if names.count(name) > 1})


def steps_by_meta(learner: LearnerSettings, *, leads: bool) -> bool:
    """Return whether [meta] steps a learner, and not an optimizer of its own.

    It does for the learner that leads, unless its options name an optimizer or a learning rate, and for one whose own
    [meta] says how to step.
    """
    own = leads and not learner.options.keys() & {"optimizer", "lr"}
    return own or bool(learner.meta.keys() & set(STEPPING_KEYS))
