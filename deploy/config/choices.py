"""Read a section of plain data, and find names and options in it that no registry knows."""

import inspect
import json
from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any

from pydantic import TypeAdapter, ValidationError

from deploy.config.messages import explain_error, format_value, wrap_lone_strings
from online_meta import registry
from trainers.seams import Seam, list_choices, list_options


def find_wrong_choices_at(seam: Seam, section: Any) -> Iterator[str]:
    """Yield a sentence for each name at a seam that no registry knows, and each option that its entry does not take."""
    for choice in list_choices(seam, section):
        in_options = not isinstance(chosen := getattr(section, seam.key), str) and choice.name not in chosen
        key = seam.options if in_options else seam.key
        try:
            known = list_options(seam, choice.name)
        except Exception as error:  # an import path runs a user's module
            reason = explain_name(seam.package, choice.name, error)
            yield f"[{seam.section}] {key} = {format_value(choice.name)}: {reason}"
            continue
        yield from find_wrong_options(choice.place, known, choice.options)


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


def explain_name(package: ModuleType, name: Any, error: Exception) -> str:
    """Say why a name cannot be loaded: the error of an import path, or the names that the registry has."""
    known = registry.names(package)
    if not isinstance(name, str) or (":" not in name and name not in known):
        return registry.nearest(str(name), known)
    return str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"


def read_plain(kind: Any, raw: dict[str, Any]) -> Any:
    """Make a dataclass of plain data by the rules of JSON: no number out of a string, no 1 out of true."""
    return TypeAdapter(kind).validate_json(json.dumps(wrap_lone_strings(kind, raw), default=str), strict=True)
