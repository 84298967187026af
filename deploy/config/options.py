"""Check the names and options that a configuration gives at each seam, by the signatures of what they name."""

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import TypeAdapter, ValidationError

from deploy.config.messages import explain_error, find_repeated, format_value
from online_meta import registry
from trainers.seams import BASELINES, COMPARATORS, SEAMS, Seam, list_choices, list_options


def find_wrong_choices(config: Any) -> Iterator[str]:
    """Yield a sentence for each name that no registry knows, and each option that its entry does not take.

    Args:
        config: a ``Config`` or ``TrainerSettings``: it has the sections of ``trainers.seams.SEAMS``.
    """
    for seam in SEAMS:
        section = getattr(config, seam.section)
        for choice in list_choices(seam, section):
            in_options = not isinstance(chosen := getattr(section, seam.key), str) and choice.name not in chosen
            key = seam.options if in_options else seam.key
            try:
                known = list_options(seam, choice.name)
            except ValueError as error:
                yield f"[{seam.section}] {key} = {format_value(choice.name)}: {_explain_name(seam, choice.name, error)}"
                continue
            yield from find_wrong_options(choice.place, known, choice.options)
    for seam in (BASELINES, COMPARATORS):
        for name in find_repeated([*getattr(config.regret, seam.key)]):
            yield f"[regret] {seam.key} names {name!r} more than once"


def find_wrong_options(place: str, known: Mapping[str, inspect.Parameter], options: Mapping[str, Any]) -> Iterator[str]:
    """Yield a sentence for each of the ``options`` at ``place`` that is unknown, missing, or of a wrong type."""
    for name, parameter in known.items():
        if parameter.default is parameter.empty and name not in options:
            yield f"[{place}] {name} is missing"
    for name, value in options.items():
        if name not in known:
            yield f"[{place}] has no key {name!r}: {registry.nearest(name, known) if known else 'it takes none'}"
            continue
        try:
            TypeAdapter(known[name].annotation).validate_python(value, strict=True)
        except ValidationError as error:
            yield explain_error({**error.errors()[0], "loc": (name,)}, place)


def _explain_name(seam: Seam, name: str, error: ValueError) -> str:
    return str(error) if ":" in name else registry.nearest(name, registry.names(seam.package))
