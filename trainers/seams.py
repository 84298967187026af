"""The seams of the configuration: each key that names an entry of a registry, and where the entry's options are.

From this table come the checks when a configuration is read, the builders of ``trainers.build``, the JSON Schema and
the reference of the configuration.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple, get_type_hints

import online_meta.aggregation
import online_meta.learners
import online_meta.metagrads
import online_meta.posteriors
import online_meta.replay
import online_meta.rules
import online_meta.schedules
import trainers.comparators
import trainers.engines
from online_meta import registry


class Seam(NamedTuple):
    """A key of the configuration that names one entry of a registry, or several.

    Attributes:
        section: the table of the key, such as "inner".
        key: such as "rule".
        package: the registry.
        options: the key of the same section that holds the entry's options; "" where there are none. If the key names
            several entries, the options are a table for each name.
        provided: the parameters of the entry that the program gives, so that they are no options.
        words: further values of the key, which name no entry.
    """

    section: str
    key: str
    package: ModuleType
    options: str
    provided: tuple[str, ...]
    words: tuple[str, ...] = ()


RULE = Seam("inner", "rule", online_meta.rules, "options", ("lr",))
HEADS = Seam("inner", "answer_heads", online_meta.rules, "", ("lr",))
POSTERIOR = Seam("inner", "posterior", online_meta.posteriors, "posterior_options", ())
GRADIENT = Seam("meta", "gradient", online_meta.metagrads, "options", ("inner",))
SCHEDULE = Seam("meta", "schedule", online_meta.schedules, "schedule_options", ())
REPLAY = Seam("meta", "replay", online_meta.replay, "replay_options", ())
ENGINE = Seam("engine", "kind", trainers.engines, "", ("settings", "meta", "rank_stats"))
BASELINES = Seam("regret", "baselines", online_meta.learners, "options", ("context",))
LEARNERS = Seam("learner", "kind", online_meta.learners, "options", ("context",))
AGGREGATION = Seam("pool", "aggregation", online_meta.aggregation, "options", (), ("auto", "none"))
COMPARATORS = Seam("regret", "comparator", trainers.comparators, "comparator_options", trainers.comparators.PROVIDED)

SEAMS = (RULE, HEADS, POSTERIOR, GRADIENT, SCHEDULE, REPLAY, ENGINE, BASELINES, AGGREGATION, COMPARATORS)
"""Every seam of a section. Learners and sources are lists of tables of their own: see ``deploy.config``."""


class Choice(NamedTuple):
    """An entry that a configuration names.

    Attributes:
        name: of the registry, or an import path.
        options: what the configuration gives for it.
        place: where these options are, such as "inner.options".
    """

    name: str
    options: Mapping[str, Any]
    place: str


def list_choices(seam: Seam, section: Any) -> Iterator[Choice]:
    """Yield what the settings of a ``section`` choose at a seam, and each name that they give options for."""
    chosen = getattr(section, seam.key)
    options = getattr(section, seam.options) if seam.options else {}
    place = f"{seam.section}.{seam.options}"
    if chosen in seam.words:
        return
    if isinstance(chosen, str):
        yield Choice(chosen, options, place)
        return
    for name in dict.fromkeys((*chosen, *options)):
        yield Choice(name, options.get(name, {}), f"{place}.{name}")


def list_options(seam: Seam, name: str) -> dict[str, inspect.Parameter]:
    """Return the parameters of an entry that are options, with their types as annotations.

    Raises ``ValueError`` if there is no such entry.
    """
    entry = registry.load(seam.package, name)
    function = entry if inspect.isfunction(entry) else entry.__init__
    # What it returns may name types that its file does not import.
    written = {key: value for key, value in function.__annotations__.items() if key != "return"}
    types = get_type_hints(SimpleNamespace(__annotations__=written), function.__globals__, include_extras=True)
    found = {
        parameter.name: parameter.replace(annotation=types.get(parameter.name, Any))
        for parameter in inspect.signature(entry).parameters.values()
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    }
    return {key: parameter for key, parameter in found.items() if key not in seam.provided}


def build(seam: Seam, choice: Choice, *arguments: Any, **provided: Any) -> Any:
    """Return what the chosen entry makes of ``arguments``, ``provided`` and its options.

    Raises ``ValueError`` for an unknown name, or options that do not fit.
    """
    entry: Callable[..., Any] = registry.load(seam.package, choice.name)
    try:
        return entry(*arguments, **provided, **choice.options)
    except TypeError as error:
        raise ValueError(f"{choice.place} = {dict(choice.options)} do not fit {choice.name!r}: {error}") from error
