"""Find the settings that decide a run's parameters: they may not change while the run lives."""

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any, Protocol, TypeVar

import online_meta.learners
from online_meta import registry
from online_meta.regret.ledger import MAIN_LEARNER
from trainers.learner_settings import list_learners
from trainers.settings import CHANGEABLE, LearnerSettings, ModelSettings, RegretSettings, TrainerSettings

RENAMED = ("how",)
"""Keys of [engine] in the records of 0.1.0 that no field has any more."""


NEW_SECTIONS = ("pool", "tuning")
"""The sections that 0.1.0 did not have: one at its defaults does not change the fingerprint."""


DEFAULTED = ("inner.answer_steps", "pool.aggregation", "regret.baselines", "regret.options.from_scratch")
"""The keys whose defaults follow from the rest of a configuration, and may be others in another version.

They are "section.key", or "section.key.entry" for an entry of a table.
"""


ADOPTED = "baseline_optimizer"
"""The key of [regret] whose value at the run's start holds for the run's life, whatever the configuration says."""


class SettingsChanged(ValueError):
    """The run was started with other settings, on which its parameters depend."""


def reproducibility_key(settings: TrainerSettings) -> dict[str, Any]:
    """Return the settings that decide the parameters, as JSON gives them back.

    The options of a learner that fits by other libraries have their versions as ``libraries``.
    """
    deciding = _deciding(_fold_learners(_note_libraries(settings)))
    chosen = {name: value for name, value in deciding.items() if value not in ({}, ()) and value is not False}
    plain: dict[str, Any] = _tuples_to_lists(chosen)
    return plain


def _note_libraries(settings: TrainerSettings) -> TrainerSettings:
    """Return the settings with the versions of the libraries on which a learner depends, unless they are noted."""

    def note(kind: str, options: dict[str, Any]) -> dict[str, Any]:
        find_versions = getattr(registry.load_module(online_meta.learners, kind), "find_versions", None)
        return options if find_versions is None else {"libraries": find_versions(options), **options}

    regret = settings.regret
    named = {name: note(name, regret.options.get(name, {})) for name in regret.baselines}
    options = {**regret.options, **{name: own for name, own in named.items() if own}}
    learners = tuple(dataclasses.replace(one, options=note(one.kind, one.options)) for one in settings.learner)
    return dataclasses.replace(settings, learner=learners, regret=dataclasses.replace(regret, options=options))


def _fold_learners(settings: TrainerSettings) -> TrainerSettings:
    """Return the settings with all learners as tables, or, if they are plain FTML and baselines, with no table at all.

    So it does not matter in which of the two ways a configuration names them.
    """
    if not settings.learner:
        return settings
    learners = list_learners(settings)
    plain = [one.kind == one.name and not (one.meta or one.inner) for one in learners]
    if all(plain) and learners[0].name == MAIN_LEARNER:
        names = tuple(one.name for one in learners[1:])
        options = {one.name: one.options for one in learners if one.options}
        learners = ()
    else:
        names, options = (), {}
    regret = dataclasses.replace(settings.regret, baselines=names, options=options)
    return dataclasses.replace(settings, learner=learners, regret=regret)


def adopt_recorded_settings(settings: TrainerSettings, recorded: dict[str, Any] | None) -> TrainerSettings:
    """Return the settings with what the run's checkpoint decides.

    These are how baselines step, of which 0.1.0 recorded nothing, and the keys that the configuration leaves open.
    """
    if recorded is None:
        return settings
    value = recorded.get("regret", {}).get(ADOPTED, "meta")
    adopted: TrainerSettings = set_keys(adopt_defaults(settings, recorded), {f"regret.{ADOPTED}": value})
    return adopted


class HasSections(Protocol):
    """Settings that keep the names of the keys which they leave open."""

    @property
    def defaults(self) -> tuple[str, ...]:
        """The keys, as in ``DEFAULTED``."""


Sections = TypeVar("Sections", bound=HasSections)


def adopt_defaults(settings: Sections, recorded: dict[str, Any]) -> Sections:
    """Return the settings, or a whole configuration, with the recorded values of the keys that it leaves open.

    A key that is not recorded did not exist when the run began; it has the value of such runs, which is the default of
    its field.
    """
    found = {}
    for key in settings.defaults:
        section, name, *entry = key.split(".", 2)
        default = getattr(type(getattr(settings, section))(), name)
        value = recorded.get(section, {}).get(name, default)
        value = value.get(entry[0], {}) if entry else value
        found[key] = tuple(value) if isinstance(value, list) else value
    adopted: Sections = set_keys(settings, found)
    return adopted


def set_keys(settings: Any, values: Mapping[str, Any]) -> Any:
    """Return settings with other ``values`` of some keys, named as in ``DEFAULTED``; a table has no empty entries."""
    for key, value in values.items():
        section, name, *entry = key.split(".", 2)
        old = getattr(settings, section)
        if entry:
            others = {one: options for one, options in getattr(old, name).items() if one != entry[0]}
            value = {**others, **({entry[0]: value} if value else {})}
        changed = dataclasses.replace(old, **{name: value})
        settings = dataclasses.replace(settings, **{section: changed})
    return settings


def check_same_settings(before: dict[str, Any], settings: TrainerSettings) -> None:
    """Compare the settings of a run's start, ``before``, with those of now.

    A setting that ``before`` lacks did not exist then; it counts as its default. One that ``settings`` leave open has
    the value of ``before``.

    Raises:
        SettingsChanged: if the two would give different parameters; it names each difference.
    """
    settings, default = adopt_defaults(settings, before), _default(settings)
    sections = {section: keys for section, keys in default.items() if isinstance(keys, dict)}
    before = {
        section: {**sections.get(section, {}), **old} if isinstance(old, dict) else old
        for section, old in {**{key: {} for key in sections}, **before}.items()
    }
    for section, known in changeable_keys(settings).items():
        before[section] = {key: value for key, value in before.get(section, {}).items() if key not in known}
    before["engine"] = {key: value for key, value in before["engine"].items() if key not in RENAMED}
    for section in ("checkpoint", "tuning"):  # A restart may change all of their keys.
        before.pop(section, None)
    now = reproducibility_key(settings)
    for regret in (before.get("regret", {}), now.get("regret", {})):
        regret.pop(ADOPTED, None)
    changes = [
        *_find_changed_learners(before, now),
        *(
            f"{section}.{key} was {old!r} and is {new!r}" if key else f"{section} was {old!r} and is {new!r}"
            for section, key, old, new in _differences(before, now)
        ),
    ]
    if changes:
        raise SettingsChanged(
            f"this run was begun with other settings: {'; '.join(changes)}. Set them back, give the new run "
            "another run.path, or play the same history with them by `online-meta replay`"
        )


def _find_changed_learners(before: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    """Yield what changed in the learners, if either has tables of them, which are taken out of both."""
    if not (before.get("learner") or now.get("learner")):
        return
    old, new = (
        {one["name"]: one for one in map(asdict, list_learners(_learners_of(record)))} for record in (before, now)
    )
    for record in (before, now):
        record.pop("learner", None)
        for key in ("baselines", "options"):
            record.get("regret", {}).pop(key, None)
    if [*old] != [*new]:
        yield f"the learners were {', '.join(old)} and are {', '.join(new)}"
        return
    for name, one in new.items():
        for key in sorted(key for key in one if one[key] != old[name][key]):
            yield f"{key} of the learner {name!r} was {old[name][key]!r} and is {one[key]!r}"


def _learners_of(record: dict[str, Any]) -> TrainerSettings:
    """Return settings with the learners of recorded ones."""
    known = record.get("regret", {})
    regret = {key: known[key] for key in ("baselines", "options") if key in known}
    learners = tuple(LearnerSettings(**one) for one in record.get("learner", ()))
    return TrainerSettings(ModelSettings(""), regret=RegretSettings(**regret), learner=learners)


def fingerprint(settings: TrainerSettings) -> str:
    """Return a hash of the settings that decide the parameters; a new setting at its default does not change it."""
    default, chosen = _default(settings), reproducibility_key(settings)
    chosen["regret"].pop(ADOPTED, None)
    own = {
        section: {k: v for k, v in keys.items() if k not in default[section] or default[section][k] != v}
        for section, keys in chosen.items()
        if isinstance(keys, dict)
    }
    left = {section: keys for section, keys in {**chosen, **own}.items() if keys or section not in NEW_SECTIONS}
    text = json.dumps(left, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _default(settings: TrainerSettings) -> dict[str, Any]:
    return reproducibility_key(TrainerSettings(ModelSettings(settings.model.build)))


def changeable_keys(settings: TrainerSettings) -> dict[str, list[str]]:
    """Return the keys of each section that a restart may change."""
    return {
        section.name: [
            item.name for item in dataclasses.fields(getattr(settings, section.name)) if item.metadata.get(CHANGEABLE)
        ]
        for section in dataclasses.fields(settings)
        if dataclasses.is_dataclass(getattr(settings, section.name))
    }


def _deciding(settings: Any) -> dict[str, Any]:
    """Return the fields of ``settings``, and of the sections in it, that a restart may not change."""
    kept = {item.name: getattr(settings, item.name) for item in dataclasses.fields(settings) if not item.metadata}
    return {
        name: _deciding(value)
        if dataclasses.is_dataclass(value)
        else tuple(map(_describe_learner, value))
        if name == "learner"
        else value
        for name, value in kept.items()
    }


def _describe_learner(learner: LearnerSettings) -> dict[str, Any]:
    """Return what a ``[[learner]]`` table says."""
    return {key: value for key, value in asdict(learner).items() if value != {}}


def _tuples_to_lists(value: Any) -> Any:
    """Turn tuples into lists, as JSON does, so that settings compare equal after a round trip."""
    if isinstance(value, dict):
        return {key: _tuples_to_lists(item) for key, item in value.items()}
    return [_tuples_to_lists(item) for item in value] if isinstance(value, list | tuple) else value


def _differences(before: dict[str, Any], now: dict[str, Any]) -> list[tuple[str, str, Any, Any]]:
    found: list[tuple[str, str, Any, Any]] = []
    for section in sorted(before.keys() | now.keys()):
        old, new = before.get(section), now.get(section)
        if isinstance(old, dict) and isinstance(new, dict):
            keys = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
            found += [(section, key, old.get(key), new.get(key)) for key in keys]
        elif old != new:
            found.append((section, "", old, new))
    return found
