"""The learners of a run: which there are, and the settings that each of them plays with."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Protocol, TypeVar

from online_meta.registry import nearest
from online_meta.regret.ledger import MAIN_LEARNER
from trainers.settings import InnerSettings, LearnerSettings, MetaSettings, RegretSettings

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


def find_learner(settings: HasLearners, name: str | None) -> LearnerSettings:
    """Return the learner that gives an answer, "NAME" or "NAME@STEPS"; for None the leading one.

    Raises ``ValueError`` if there is none of this name.
    """
    learners = {learner.name: learner for learner in list_learners(settings)}
    wanted = next(iter(learners)) if name is None else name.partition("@")[0]
    if wanted not in learners:
        raise ValueError(f"no learner is called {wanted!r}: {nearest(wanted, learners)}")
    return learners[wanted]


def find_repeated_names(learners: Sequence[LearnerSettings]) -> list[str]:
    """Return the names that more than one learner has."""
    names = [learner.name for learner in learners]
    return sorted({name for name in names if names.count(name) > 1})


def steps_by_meta(learner: LearnerSettings, *, leads: bool) -> bool:
    """Return whether [meta] steps a learner, and not an optimizer of its own.

    It does for the learner that leads, unless its options name an optimizer or a learning rate, and for one whose own
    [meta] says how to step.
    """
    own = leads and not learner.options.keys() & {"optimizer", "lr"}
    return own or bool(learner.meta.keys() & set(STEPPING_KEYS))
