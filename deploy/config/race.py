"""Settings that are "auto": read their candidates, and let these play as further learners and answers."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeVar

from trainers.learner_settings import HasLearners, list_learners, override_settings, steps_by_meta
from trainers.settings import LearnerSettings, TuningSettings

AUTO = {"inner.lr": "inner_lr", "inner.steps": "inner_steps", "meta.lr": "meta_lr"}
"""The keys that may be "auto", and the keys of [tuning] with their candidates."""
WORD = "auto"


class HasRace(HasLearners, Protocol):
    """A whole configuration, as far as a race needs it."""

    @property
    def tuning(self) -> TuningSettings:
        """The section [tuning]."""

    @property
    def race(self) -> tuple[str, ...]:
        """The answers that race."""


Raced = TypeVar("Raced", bound=HasRace)


def take_auto(raw: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return a configuration with the first candidate in place of each "auto", and the keys where it was."""
    found, changed = [], dict(raw)
    for key, candidates in AUTO.items():
        section, _, name = key.partition(".")
        own = changed.get(section)
        if isinstance(own, dict) and own.get(name) == WORD:
            tuning = raw.get("tuning")
            known = tuning.get(candidates) if isinstance(tuning, dict) else None
            first = known[0] if isinstance(known, list) and known else getattr(TuningSettings(), candidates)[0]
            changed[section] = {**own, name: first}
            found.append(key)
    return changed, found


def find_wrong_race(config: HasRace, keys: Sequence[str]) -> Iterator[str]:
    """Yield a sentence for whatever keeps the settings ``keys`` from being chosen by a race."""
    leader = list_learners(config)[0]
    for key in keys:
        section, _, name = key.partition(".")
        if name in getattr(leader, section):
            yield f"[{section}] {name} = 'auto': the [[learner]] {leader.name!r} has a value of its own; leave that out"
    if "meta.lr" in keys and not steps_by_meta(leader, leads=True):
        yield f"[meta] lr = 'auto': the options of {leader.name!r} say how it steps, not [meta]"
    count = sum(len(getattr(config.tuning, AUTO[key])) - 1 for key in keys if key != "inner.steps")
    if count > config.tuning.budget:
        yield (
            f"[tuning] budget = {config.tuning.budget:g}: {count} further learning rates race, and each costs a "
            f"meta-update a round: set budget = {count}, or name fewer candidates"
        )


def enter_race(config: Raced, keys: Sequence[str]) -> Raced:
    """Return the configuration with the candidates for ``keys`` as learners and answers, and the names that race.

    Each further learning rate is a learner like the leading one, such as "ftml.inner.lr=0.03". Each further number K of
    inner steps is an answer of all of these, such as "ftml@10".
    """
    if not keys:
        return config
    tuning, (leader, *others) = config.tuning, list_learners(config)
    steps = tuning.inner_steps[1:] if "inner.steps" in keys else ()
    ladder = override_settings(config, leader).inner.answer_steps
    variants = [leader]
    for key in keys:
        section, _, name = key.partition(".")
        for value in getattr(tuning, AUTO[key])[1:] if key != "inner.steps" else ():
            own: dict[str, Any] = {section: {**getattr(leader, section), name: value}}
            variants.append(dataclasses.replace(leader, name=f"{leader.name}.{key}={value:g}", **own))
    first = _answer_at(leader, (*ladder, *steps)) if steps else leader
    found = [first, *(_answer_at(one, steps) for one in variants[1:])]
    race = tuple(one.name + suffix for one in found for suffix in ("", *(f"@{k}" for k in steps)))
    tables = (*found, *(one for one in others if one.name not in config.regret.baselines))
    open_keys = tuple(key for key in config.defaults if not key.startswith("regret."))
    return dataclasses.replace(config, learner=tables, race=race, defaults=open_keys)  # type: ignore[type-var]


def _answer_at(learner: LearnerSettings, steps: Sequence[int]) -> LearnerSettings:
    """Return a learner that also answers after these numbers of inner steps."""
    return dataclasses.replace(learner, inner={**learner.inner, "answer_steps": sorted(set(steps))})
