"""Explain what is wrong in a configuration, and what would be right."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any, get_origin, get_type_hints

from deploy.config.describe import EXAMPLES, LONE_NUMBERS, find_named_type
from online_meta import registry

MESSAGE_REWRITES = {
    "Input should be ": "must be ",
    "Tuple should ": "must ",
    "String should ": "must ",
    "a valid tuple": "a list",
    "a valid array": "a list",
    "a valid integer": "a whole number",
    "a valid number": "a number",
    "a valid string": "a string",
    "a valid dictionary": "a table",
    "greater than or equal to": "at least",
    "less than or equal to": "at most",
    " after validation": "",
    "Value error, ": "",
}


def find_unknown_keys(kind: Any, raw: dict[str, Any], section: str, more: tuple[str, ...] = ()) -> list[str]:
    """List a sentence for each key that the dataclass ``kind`` does not know, and for those inside."""
    types = get_type_hints(kind, include_extras=False)
    known = [item.name for item in dataclasses.fields(kind) if not item.metadata.get("internal")]
    problems = []
    for key, value in raw.items():
        if not section and key not in known and not isinstance(value, dict | list):
            problems.append(
                f"{key} = {format_value(value)} stands in no section: put it below one of [{'], ['.join(known)}]"
            )
        elif key not in known:
            what = f"[{section}] has no key {key!r}" if section else f"there is no section [{key}]"
            problems.append(f"{what}: {registry.nearest(key, [*known, *more])}")
        elif dataclasses.is_dataclass(types[key]):
            inside = f"{section}.{key}" if section else key
            problems += _find_unknown_inside(types[key], value, inside)
        elif (named := find_named_type(types[key])) is not None:
            inside = f"{section}.{key}"
            if not isinstance(value, dict):
                problems.append(f"{inside} = {format_value(value)}: it must be tables, [{inside}.NAME]")
                continue
            for name, table in value.items():
                problems += _find_unknown_inside(named, table, f"{inside}.{name}")
    return problems


def _find_unknown_inside(kind: Any, value: Any, inside: str) -> list[str]:
    if isinstance(value, dict):
        return find_unknown_keys(kind, value, inside)
    return [f"{inside} = {format_value(value)}: it must be a table, [{inside}]"]


def find_nonfinite_numbers(raw: Any, place: tuple[str | int, ...] = ()) -> Iterator[str]:
    """Give a sentence for each number that is infinite or NaN: none is of use, and JSON has none."""
    if isinstance(raw, dict | list):
        items = raw.items() if isinstance(raw, dict) else enumerate(raw)
        for key, value in items:
            yield from find_nonfinite_numbers(value, (*place, key))
    elif isinstance(raw, float) and not math.isfinite(raw):
        yield f"{_format_place(place)} = {raw}: must be a finite number"


def wrap_lone_strings(kind: Any, raw: dict[str, Any]) -> dict[str, Any]:
    """Return ``raw`` with a lone string or number put into a list where the dataclass ``kind`` takes such a list."""
    types = get_type_hints(kind)
    changed = dict(raw)
    for key, value in raw.items():
        lone = isinstance(value, str) or (key in LONE_NUMBERS and not isinstance(value, list))
        if lone and get_origin(types[key]) is tuple:
            changed[key] = [value]
        elif isinstance(value, dict) and dataclasses.is_dataclass(types[key]):
            changed[key] = wrap_lone_strings(types[key], value)
        elif isinstance(value, dict) and (item := find_named_type(types[key])) is not None:
            changed[key] = {name: wrap_lone_strings(item, table) for name, table in value.items()}
    return changed


def explain_error(item: Any, section: str = "") -> str:
    """Return a sentence for an error of pydantic, of a key in ``section`` or of the whole configuration."""
    place = (section, *item["loc"]) if section else tuple(item["loc"])
    if item["type"] == "missing":
        dotted = ".".join(str(part) for part in place)
        example = f", for example {EXAMPLES[dotted]}" if dotted in EXAMPLES else ""
        return f"{_format_place(place) if len(place) > 1 else f'section [{dotted}]'} is missing{example}"
    message = item["msg"]
    for pattern, replacement in MESSAGE_REWRITES.items():
        message = message.replace(pattern, replacement)
    if item["type"] == "value_error":
        return f"[{'.'.join(str(part) for part in place)}] {message}"
    return f"{_format_place(place)} = {format_value(item['input'])}: {message.split(', unable')[0].split(', got')[0]}"


def relabel(problem: str, label: str) -> str:
    """Return a problem of a section, such as "[meta] lr = 0: ...", as that of a table: "[label] meta.lr = 0: ..."."""
    section, rest = problem.removeprefix("[").split("] ", 1)
    joint = " " if rest.startswith("has no key") else "."
    return f"[{label}] {section}{joint}{rest}"


def format_value(value: object) -> str:
    """Return a value as it stands in a configuration."""
    return str(value).lower() if isinstance(value, bool) else repr(value)


def join_problems(where: str, problems: list[str]) -> str:
    """Join problems to one message: a line for one, a line each for several."""
    return f"{where}: {problems[0]}" if len(problems) == 1 else "\n  ".join([f"{where}:", *problems])


def find_repeated(names: list[str]) -> list[str]:
    """Return the names that are there more than once."""
    return sorted({name for name in names if names.count(name) > 1})


def _format_place(place: tuple[str | int, ...]) -> str:
    """Return ("task", "x_shape", 0) as people write it: [task] x_shape[0]."""
    names = [part for part in place if isinstance(part, str)]
    index = "".join(f"[{part}]" for part in place if isinstance(part, int))
    section = f"[{'.'.join(names[:-1])}] " if len(names) > 1 else ""
    return f"{section}{names[-1] if names else 'configuration'}{index}"
