"""Read the ``[[learner]]`` tables, and find what is wrong in them."""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, Protocol, TypeVar

from pydantic import TypeAdapter, ValidationError

import online_meta.learners
import trainers.comparators
from deploy.config.choices import explain_name, find_wrong_choices_at, find_wrong_options, read_plain
from deploy.config.messages import explain_error, find_unknown_keys, format_value, relabel
from online_meta import registry
from online_meta.learners import TaskShape, can_answer
from streams.spec import TaskSpec, is_dynamic
from trainers.learner_settings import (
    POOL,
    STEPPING_KEYS,
    HasLearners,
    Settings,
    find_repeated_names,
    find_run_keys,
    list_players,
    override_settings,
)
from trainers.seams import GRADIENT, LEARNERS, POSTERIOR, REPLAY, RULE, SCHEDULE, list_options
from trainers.settings import InnerSettings, LearnerSettings, MetaSettings, ModelSettings
from trainers.settings_fingerprint import DEFAULTED, set_keys

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
"""Names of learners are those of files and fields, and those of sources begin task ids; both label metrics."""


class HasDefaults(HasLearners, Protocol):
    """A whole configuration, as far as ``fill_defaults`` needs it."""

    @property
    def task(self) -> TaskSpec:
        """The section [task]."""

    @property
    def model(self) -> ModelSettings:
        """The section [model]."""


Defaulted = TypeVar("Defaulted", bound=HasDefaults)


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
    yield from _find_wrong_names(config, answers)


def _find_wrong_names(config: HasLearners, answers: str | None) -> Iterator[str]:
    """Yield a sentence for each name of a learner that is repeated or does not exist."""
    names = [learner.name for learner in config.learner]
    for name in find_repeated_names(list_players(config)):
        if name in names and name in config.regret.baselines:
            yield f"[regret] baselines = {name!r}: a [[learner]] has this name already"
        elif name == POOL:
            yield f"a learner is called {name!r}, as the pool is: name it otherwise, or set pool.aggregation = 'none'"
        elif name in names:
            yield f"[[learner]] two are called {name!r}: give one another name"
        else:
            yield f"[regret] baselines = {name!r} is the learner that the baselines are compared with"
    known_names = list_players(config)
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
    shadow = table.get("shadow", False)
    if not isinstance(shadow, bool):
        problems.append(f"[{label}] shadow = {format_value(shadow)}: it is true or false")
        return None
    learner = LearnerSettings(str(kind), str(name), **sections, shadow=shadow)
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


LADDER = (0, 1, 2, 5, 10, 20)
"""The numbers of inner steps after which each learner also answers by default, if there is a pool."""
CHEAP = ("constant", "ridge_head", "logistic_head", "pooled_ridge", "pooled_logistic")
"""The learners in closed form that play by default where they can answer."""
FEW_INPUTS = 64
"""The largest number of inputs for which ``hierarchical_bayes`` plays by default: it takes 1 to 6 ms a round."""
FROM_SCRATCH: dict[bool, dict[str, Any]] = {True: {"steps": 20, "lr": 0.003}, False: {"steps": 50, "lr": 0.01}}
"""The options of *from scratch* by whether it tells classes apart, if it plays by default.

They were chosen among 10 to 100 steps and rates of 0.002 to 0.03 on seeds 100 and 101 of the streams of
docs/results/pool.md, which the page does not use. More steps would cost more than all other learners together, and are
worse for classes.
"""


def fill_defaults(config: Defaulted, raw: Mapping[str, Any]) -> Defaulted:
    """Return the configuration with what follows from the rest of it, and the names of these keys as ``defaults``.

    Args:
        config: as it was read.
        raw: what the file says.
    """
    own = {key for key in DEFAULTED if _says(raw, key)}
    named = [*(one.name for one in config.learner), *config.regret.baselines]
    alone = "regret.baselines" in own and not named
    chosen: dict[str, Any] = {"pool.aggregation": "none" if alone or POOL in named else "auto"}
    if not config.learner:
        chosen["regret.baselines"] = ("from_scratch", *_list_cheap_learners(config.task, config.model.loss))
        if "regret.baselines" not in own:
            chosen["regret.options.from_scratch"] = FROM_SCRATCH[config.task.y == "class"]
    pooled = (config.pool.aggregation if "pool.aggregation" in own else chosen["pool.aggregation"]) != "none"
    chosen["inner.answer_steps"] = tuple(k for k in LADDER if k != config.inner.steps) if pooled else ()
    free = {key: value for key, value in chosen.items() if key not in own}
    filled = set_keys(config, free)
    with_names: Defaulted = dataclasses.replace(filled, defaults=tuple(sorted(free)))
    return with_names


def _says(raw: Mapping[str, Any], key: str) -> bool:
    """Return whether a file has a value for a key that is named as in ``DEFAULTED``."""
    *tables, name = key.split(".", 2)
    found: Any = raw
    for table in tables:
        found = found.get(table, {}) if isinstance(found, Mapping) else {}
    return isinstance(found, Mapping) and name in found


def _flatten_inputs(task: TaskSpec) -> tuple[tuple[int, ...], str]:
    """Return the shape and the dtype of an input; named inputs count as one row of all their numbers.

    If one of them is int64, such as tokens, so is the row; if one has an open dimension, so has the row.
    """
    if task.x_shape is not None:
        return task.x_shape, task.x_dtype
    inputs = task.inputs().values()
    dtypes = [one.dtype for one in inputs]
    size = -1 if any(is_dynamic(one.shape) for one in inputs) else sum(math.prod(one.shape) for one in inputs)
    return (size,), "int64" if "int64" in dtypes else dtypes[0]


def _list_cheap_learners(task: TaskSpec, loss: str) -> tuple[str, ...]:
    """Return the learners in closed form that play by default: those that can answer such tasks."""
    if task.targets:
        return ()
    x_shape, x_dtype = _flatten_inputs(task)
    shape = TaskShape(loss, x_shape, x_dtype, task.y_shape)
    few = min(x_shape, default=0) >= 0 and math.prod(x_shape) <= FEW_INPUTS
    learners = (*CHEAP, "hierarchical_bayes") if few else CHEAP
    return tuple(name for name in learners if can_answer(name, shape))
