"""The learners of a run: which there are, the settings that each of them plays with, and what a race changes."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

from online_meta.learners.pool import NAME
from online_meta.registry import nearest
from online_meta.regret.ledger import MAIN_LEARNER
from trainers.settings import (
    InnerSettings,
    LearnerSettings,
    MetaSettings,
    PoolSettings,
    RegretSettings,
    TrainerSettings,
)

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

    @property
    def defaults(self) -> tuple[str, ...]:
        """The keys, as "section.key", that the configuration leaves open."""


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


class Decision(NamedTuple):
    """A decision of a race.

    Attributes:
        round: the first round that is played with it.
        dropped: the answers that no longer race.
        winner: the answer that has won the race; None if it goes on.
    """

    round: int
    dropped: tuple[str, ...]
    winner: str | None = None


def obey_decisions(settings: TrainerSettings, decisions: Sequence[Decision]) -> TrainerSettings:
    """Return the settings after the decisions of their race.

    An answer NAME@K that is dropped is not made any more, and a learner whose answers are all dropped does not play any
    more, unless it leads. The learner of the winner plays on in place of the leading one, under its name; the other
    contestants end. Its answer is what the run answers with, if there is no pool and nothing else is named.
    """
    if not decisions:
        return settings
    dropped = {name for decision in decisions for name in decision.dropped}
    winner, (leader, *others) = decisions[-1].winner, list_learners(settings)
    contestants = {name.partition("@")[0] for name in settings.race}
    if winner is None:
        racing = {name.partition("@")[0] for name in settings.race if name not in dropped}
        kept = [one for one in others if one.name not in contestants or one.name in racing]
        left = [_leave_out(one, one, settings, dropped) for one in (leader, *kept) if one.name in contestants]
        return _replace_learners(settings, [*left, *(one for one in kept if one.name not in contestants)])
    name = winner.partition("@")[0]
    won = next(one for one in (leader, *others) if one.name == name)
    own = _leave_out(leader, won, settings, dropped)
    own = dataclasses.replace(won, name=leader.name, inner={**own.inner, **_own_values(won)})
    changed = _replace_learners(settings, [own, *(one for one in others if one.name not in contestants)])
    if settings.answers is not None or has_pool(settings):
        return changed
    return dataclasses.replace(changed, answers=leader.name + winner.removeprefix(name))


def _own_values(learner: LearnerSettings) -> dict[str, Any]:
    """Return what a learner has of its own in [inner], but for the numbers of steps after which it answers."""
    return {key: value for key, value in learner.inner.items() if key != "answer_steps"}


def _leave_out(
    learner: LearnerSettings, contestant: LearnerSettings, settings: TrainerSettings, dropped: set[str]
) -> LearnerSettings:
    """Return a learner without the numbers of steps after which the answers of a ``contestant`` are dropped."""
    steps = override_settings(settings, learner).inner.answer_steps
    kept = [k for k in steps if f"{contestant.name}@{k}" not in dropped]
    return (
        learner
        if len(kept) == len(steps)
        else dataclasses.replace(learner, inner={**learner.inner, "answer_steps": kept})
    )


def _replace_learners(settings: TrainerSettings, learners: Sequence[LearnerSettings]) -> TrainerSettings:
    """Return the settings with these learners as tables, before the baselines of [regret]."""
    baselines = set(settings.regret.baselines)
    return dataclasses.replace(settings, learner=tuple(one for one in learners if one.name not in baselines))
