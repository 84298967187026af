"""Read the ``[[learner]]`` tables, and find what is wrong in them."""

import re
from collections.abc import Iterator
from typing import Any

from pydantic import TypeAdapter, ValidationError

import online_meta.learners
import trainers.comparators
from deploy.config.choices import explain_name, find_wrong_choices_at, find_wrong_options, read_plain
from deploy.config.messages import explain_error, find_unknown_keys, format_value, relabel
from online_meta import registry
from trainers.learner_settings import (
    STEPPING_KEYS,
    Settings,
    find_repeated_names,
    find_run_keys,
    list_learners,
    override_settings,
)
from trainers.seams import GRADIENT, LEARNERS, POSTERIOR, REPLAY, RULE, SCHEDULE, list_options
from trainers.settings import InnerSettings, LearnerSettings, MetaSettings

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
"""Names of learners are those of files and fields, and those of sources begin task ids; both label metrics."""


def find_wrong_learners(config: Settings, answers: str | None) -> Iterator[str]:
    """Yield a sentence for each option that does not fit a learner, and for names that are repeated or do not exist.

    ``answers`` is the name of the learner whose answers are served; None for the one that leads.
    """
    for at, learner in enumerate(config.learner):
        label, own = label_learner(at, learner.name), override_settings(config, learner)
        for seam in (RULE, POSTERIOR, GRADIENT, SCHEDULE, REPLAY):
            if getattr(learner, seam.section):
                found = find_wrong_choices_at(seam, getattr(own, seam.section))
                yield from (relabel(problem, label) for problem in found)
        known = list_options(LEARNERS, learner.kind)
        yield from (relabel(problem, label) for problem in find_wrong_options("options", known, learner.options))
        if learner.options.keys() & known.keys() & {"optimizer", "lr"}:
            for key in sorted(learner.meta.keys() & set(STEPPING_KEYS)):
                yield f"[{label}] meta.{key} and options both say how to step: keep one of them"
    names = [learner.name for learner in config.learner]
    for name in find_repeated_names(list_learners(config)):
        if name in names and name in config.regret.baselines:
            yield f"[regret] baselines = {name!r}: a [[learner]] has this name already"
        elif name in names:
            yield f"[[learner]] two are called {name!r}: give one another name"
        else:
            yield f"[regret] baselines = {name!r} is the learner that the baselines are compared with"
    known_names = [one.name for one in list_learners(config)]
    if answers is not None and answers.partition("@")[0] not in known_names:
        yield f"[serve] answers = {answers!r}: no learner has this name; {registry.nearest(answers, known_names)}"


def label_learner(index: int, name: str) -> str:
    """Return what messages call the table number ``index``, from 0, of ``[[learner]]``: learner 1 "fast"."""
    return f'learner {index + 1} "{name}"'


def make_learner(table: dict[str, Any], index: int, problems: list[str]) -> LearnerSettings | None:
    """Read a ``[[learner]]`` table; add what is wrong to ``problems`` and return None then."""
    kind, before = table.get("kind"), len(problems)
    problems += find_unknown_keys(LearnerSettings, table, f"learner {index + 1}")
    try:
        registry.load(online_meta.learners, kind if isinstance(kind, str) else "")
    except Exception as error:  # an import path runs a user's module
        what = "kind is missing" if kind is None else f"kind = {format_value(kind)}"
        problems.append(f"[learner {index + 1}] {what}: {explain_name(online_meta.learners, kind, error)}")
        return None
    name = table.get("name", re.split(r"[.:]", str(kind))[-1])
    label = label_learner(index, name) if isinstance(name, str) else f"learner {index + 1}"
    problems += _find_wrong_name(name, str(kind), label)
    sections: dict[str, dict[str, Any]] = {}
    for part, section in (("meta", MetaSettings), ("inner", InnerSettings), ("options", None)):
        own = table.get(part, {})
        if not isinstance(own, dict):
            problems.append(f"[{label}] {part} = {format_value(own)}: it must be a table, [learner.{part}]")
        else:
            sections[part] = own if section is None else _read_own(section, part, own, label, problems)
    if len(problems) > before:
        return None
    learner = LearnerSettings(str(kind), str(name), **sections)
    problems += (f"[{label}] meta.{key} counts for the whole run: set it in [meta]" for key in find_run_keys(learner))
    return learner if len(problems) == before else None


def _find_wrong_name(name: Any, kind: str, label: str) -> Iterator[str]:
    """Yield what is wrong with the name of a learner."""
    if not isinstance(name, str) or not NAME.fullmatch(name):
        yield f"[{label}] name = {format_value(name)}: must be letters, digits, '.', '_' or '-', such as 'fast'"
    elif name != kind and name in registry.names(online_meta.learners):
        yield f"[{label}] name = {name!r} is the name of another kind than {kind!r}"
    elif name in registry.names(trainers.comparators):
        yield f"[{label}] name = {name!r} is the name of a comparator: take another one"


def _read_own(kind: Any, part: str, own: dict[str, Any], label: str, problems: list[str]) -> dict[str, Any]:
    """Return the keys of [meta] or [inner] that a learner has of its own, checked as those of the section are."""
    unknown = find_unknown_keys(kind, own, part)
    problems += (relabel(problem, label) for problem in unknown)
    if unknown:
        return {}
    try:
        read = read_plain(kind, own)
    except ValidationError as error:
        problems += (relabel(explain_error(item, part), label) for item in error.errors())
        return {}
    plain: dict[str, Any] = TypeAdapter(kind).dump_python(read, mode="json")
    return {key: plain[key] for key in own}
