"""Describe the configuration: its keys, a JSON Schema, and a commented example.

Everything comes from the dataclasses of the sections, their docstrings, and the table of seams.
"""

import inspect
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from types import UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import TypeAdapter

import streams.sources
from deploy.config.race import AUTO, WORD
from online_meta import registry
from streams.ingest.outliers import OutlierRule
from trainers.learner_settings import RUN_KEYS
from trainers.seams import GRADIENT, LEARNERS, POSTERIOR, REPLAY, RULE, SCHEDULE, SEAMS, Seam, list_options
from trainers.settings import CHANGEABLE, InnerSettings, LearnerSettings, MetaSettings, TrainerSettings
from trainers.settings_fingerprint import DEFAULTED

ANY_NAME = "NAME"
"""What stands for a name of the user's own in the name of a section, such as "task.x.NAME"."""

INTERNAL = {"internal": True}
"""Metadata of a field that is no key of the configuration file."""

EXAMPLES = {
    "run": 'path = "runs/first"',
    "task": 'x_shape = [1], y = "real", y_shape = [1]',
    "model": 'build = "trainers.models:mlp", args = { inputs = 1, outputs = 1 }, loss = "mse"',
    "run.path": 'path = "runs/first"',
    "task.x_shape": "x_shape = [3, 28, 28]",
    "model.build": 'build = "trainers.models:mlp"',
}
"""What to write where a section or a key is missing that has no default."""

EXAMPLE_VALUES = {
    "run.path": "runs/first",
    "task.x_shape": (1,),
    "task.y": "real",
    "task.y_shape": (1,),
    "model.build": "trainers.models:mlp",
    "model.args": {"inputs": 1, "outputs": 1},
    "model.loss": "mse",
}
"""The values of the example, where it needs others than the defaults."""

LONE_NUMBERS = ("answer_steps",)
"""Lists of numbers for which one number may stand."""

DECIDING = {item.name for item in fields(TrainerSettings)}
"""Sections with keys that decide the parameters of a run."""

IMPORT_PATH = r"^[\w.]+:\w+$"
BOUNDS = {Ge: ("ge", "at least"), Gt: ("gt", "more than"), Le: ("le", "at most"), Lt: ("lt", "less than")}


PLAIN_TYPES = {
    int: "whole number",
    float: "number",
    str: "string",
    bool: "true or false",
    dict: "table",
    Sequence: "list",
    Any: "value",
}


class Key(NamedTuple):
    """A key of the configuration.

    Attributes:
        section: dotted, such as "serve.limits".
        name: of the key.
        type: in words, with its range.
        default: as TOML; "" if it follows from the rest of the configuration, None if the key is required.
        description: from the docstring of the section.
        changeable: whether a run may be restarted with another value; None where nothing learned depends on it.
    """

    section: str
    name: str
    type: str
    default: str | None
    description: str
    changeable: bool | None


def list_sections(kind: type[Any]) -> Iterator[tuple[str, type[Any], list[Key]]]:
    """Yield each section of the configuration ``kind``, dotted, with its dataclass and its keys.

    The list of sources is no section: see ``streams.sources``.
    """
    types = get_type_hints(kind)
    for item in fields(kind):
        if is_dataclass(types[item.name]):
            yield from _walk(item.name, types[item.name])


def find_named_type(kind: Any) -> type[Any] | None:
    """Return the dataclass of the tables that a mapping has by name; None for a field of another type."""
    inside = get_args(kind)
    found = get_origin(kind) is Mapping and len(inside) == 2 and is_dataclass(inside[1])
    return inside[1] if found else None


def list_keys(kind: type[Any], section: str) -> list[Key]:
    """List the keys of the dataclass ``kind`` of a ``section``, without those that are tables of their own."""
    types, texts = get_type_hints(kind, include_extras=True), describe_fields(kind)
    return [
        Key(
            section,
            item.name,
            describe_type(types[item.name]) + (f' or "{WORD}"' if f"{section}.{item.name}" in AUTO else ""),
            "" if f"{section}.{item.name}" in DEFAULTED else format_default(item),
            texts.get(item.name, ""),
            item.metadata.get(CHANGEABLE, False) if section in DECIDING else None,
        )
        for item in fields(kind)
        if not is_dataclass(types[item.name])
        and find_named_type(types[item.name]) is None
        and not item.metadata.get("internal")
    ]


def describe_fields(kind: type[Any]) -> dict[str, str]:
    """Return the descriptions of a dataclass's fields, from the "Attributes:" lists of its docstring and its bases'."""
    described: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        _, _, listed = inspect.cleandoc(base.__doc__ or "").partition("Attributes:\n")
        block = re.split(r"\n(?=\S)", listed)[0]
        found = re.findall(r"(?m)^    (\w+): ((?:.*)(?:\n     +.*)*)", block)
        described |= {name: " ".join(text.split()) for name, text in found}
    return described


def describe_type(kind: Any) -> str:
    """Return a type and its range in words, such as "whole number, at least 1"."""
    if get_origin(kind) is Annotated:
        inner, *notes = get_args(kind)
        bounds = [_describe_bound(note) for note in notes]
        return ", ".join([describe_type(inner), *filter(None, bounds)])
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(json.dumps(value) for value in get_args(kind))
    if get_origin(kind) in (Union, UnionType):
        return " or ".join(describe_type(one) for one in get_args(kind) if one is not type(None))
    if get_origin(kind) is tuple:
        items = [one for one in get_args(kind) if one is not ...]
        return f"list of {describe_type(items[0])}" if len(items) == 1 else f"list of {len(items)} numbers"
    plain = {
        int: "whole number",
        float: "number",
        str: "string",
        bool: "true or false",
        dict: "table",
        Sequence: "list",
        Any: "value",
    }
    return plain.get(get_origin(kind) or kind, getattr(kind, "__name__", str(kind)))


def format_default(item: "Field[Any]") -> str | None:
    """Return a field's default as TOML, "" for None (the key is left out), None if it has none."""
    if item.default_factory is not MISSING:
        return format_toml(item.default_factory())
    return None if item.default is MISSING else format_toml(item.default)


def format_toml(value: Any) -> str:
    """Return a value as TOML; "" for None, which TOML does not have."""
    if value is None:
        return ""
    if isinstance(value, Mapping):
        items = ", ".join(f"{key} = {format_toml(item)}" for key, item in value.items())
        return f"{{ {items} }}" if items else "{}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(format_toml(item) for item in value)}]"
    return json.dumps(value)


def make_example(kind: type[Any]) -> str:
    """Return a complete TOML file: what is required, and every other key as a comment with its default."""
    lines = ["# A complete configuration. A line `# key = value` shows a default.", ""]
    for section, table, keys in list_sections(kind):
        named = section.endswith(f".{ANY_NAME}")  # There is no such table unless the user writes one.
        lines += [*(f"# {line}" for line in _wrap(_first_sentence(table))), f"{'# ' if named else ''}[{section}]"]
        for key in keys:
            wanted = EXAMPLE_VALUES.get(f"{section}.{key.name}")
            lines += [f"# {line}" for line in _wrap(f"{key.description} ({key.type})".replace("``", "`"))]
            value = format_toml(wanted) if wanted is not None else key.default
            mark = "" if wanted is not None else "# "
            lines += [f"{mark}{key.name} = {value}" if value and not named else f"# {key.name} is not set"]
        lines.append("")
    lines += [
        "# Learners that play side by side, by default FTML and the baselines of [regret], are tables of their own:"
    ]
    lines += ["# [[learner]], with `kind`, `name`, and the tables `meta`, `inner` and `options`.", ""]
    lines += ["# Where tasks come from. One such table for each source.", "[[source]]", 'kind = "http"']
    return "\n".join(lines) + "\n"


def make_schema(kind: type[Any]) -> dict[str, Any]:
    """Return the configuration's JSON Schema (draft 2020-12), for editors that complete and check TOML."""
    schema = TypeAdapter(kind).json_schema()
    root = schema["properties"]
    for item in fields(kind):
        if item.metadata.get("internal"):
            del root[item.name]
    for section, table, _ in list_sections(kind):
        _add_texts(schema["$defs"][table.__name__], table, section)
    for seam in SEAMS:
        table = get_type_hints(kind)[seam.section]
        _add_seam(schema["$defs"][table.__name__], seam)
    for key in AUTO:
        section, _, name = key.partition(".")
        _allow_auto(schema["$defs"][get_type_hints(kind)[section].__name__]["properties"], name)
    for unused in ("SourceConfig", "LearnerSettings"):
        schema["$defs"].pop(unused, None)
    root["learner"] = {"type": "array", "items": {"oneOf": [*_list_learner_schemas()]}}
    root["source"] = {"type": "array", "items": {"oneOf": [*_list_source_schemas()]}}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "additionalProperties": False}


def _walk(section: str, kind: type[Any]) -> Iterator[tuple[str, type[Any], list[Key]]]:
    yield section, kind, list_keys(kind, section)
    types = get_type_hints(kind)
    for item in fields(kind):
        if is_dataclass(types[item.name]):
            yield from _walk(f"{section}.{item.name}", types[item.name])
        elif named := find_named_type(types[item.name]):
            yield from _walk(f"{section}.{item.name}.{ANY_NAME}", named)


def _describe_bound(note: Any) -> str:
    if isinstance(note, MinLen):
        return "not empty" if note.min_length == 1 else f"{note.min_length} or more"
    slot, words = BOUNDS.get(type(note), ("", ""))
    return f"{words} {getattr(note, slot)}" if slot else ""


def _first_sentence(kind: type[Any]) -> str:
    return (inspect.getdoc(kind) or "").split("\n\n")[0].replace("\n", " ")


def _wrap(text: str, width: int = 110) -> list[str]:
    lines = [""]
    for word in text.split():
        lines = [*lines[:-1], f"{lines[-1]} {word}".strip()] if len(lines[-1] + word) < width else [*lines, word]
    return lines


def _add_texts(schema: dict[str, Any], kind: type[Any], section: str) -> None:
    """Add each field's description, forbid unknown keys, and allow a lone string where a list of strings goes."""
    schema["additionalProperties"] = False
    schema["description"] = f"[{section}] {_first_sentence(kind)}"
    for name, text in describe_fields(kind).items():
        entry = schema["properties"].get(name)
        if entry is None or "$ref" in entry:
            continue
        if entry.get("type") == "array" and (name in LONE_NUMBERS or entry.get("items", {}).get("type") == "string"):
            entry = {"anyOf": [{key: value for key, value in entry.items() if key != "default"}, entry["items"]]}
        schema["properties"][name] = {**entry, "description": text}


def _allow_auto(properties: dict[str, Any], name: str) -> None:
    """Let the property ``name`` be "auto", too."""
    around = ("default", "description", "title")
    number = {key: value for key, value in properties[name].items() if key not in around}
    kept = {key: value for key, value in properties[name].items() if key in around}
    properties[name] = {**kept, "anyOf": [number, {"const": WORD}]}


def _add_seam(schema: dict[str, Any], seam: Seam) -> None:
    """List the registry's names at the seam's key, and each entry's options at theirs."""
    entry = schema["properties"][seam.key]
    name = {
        "anyOf": [{"enum": [*registry.names(seam.package), *seam.words]}, {"type": "string", "pattern": IMPORT_PATH}]
    }
    several = "anyOf" in entry or entry.get("type") == "array"
    kept = {key: value for key, value in entry.items() if key in ("default", "description", "title")}
    array = {"type": "array", "items": name}
    schema["properties"][seam.key] = {**kept, **({"anyOf": [array, *name["anyOf"]]} if several else name)}
    if not seam.options:
        return
    options = {known: make_options_schema(seam, known) for known in registry.names(seam.package)}
    if several:
        schema["properties"][seam.options] = {
            "type": "object",
            "properties": options,
            "patternProperties": {IMPORT_PATH: {"type": "object"}},
            "additionalProperties": False,
        }
        return
    default = entry.get("default")
    schema.setdefault("allOf", []).extend(
        {
            "if": {
                "properties": {seam.key: {"const": known}},
                **({} if known == default else {"required": [seam.key]}),
            },
            "then": {"properties": {seam.options: table}},
        }
        for known, table in options.items()
    )


def make_options_schema(seam: Seam, name: str) -> dict[str, Any]:
    """Return the JSON Schema of the options of an entry."""
    known = list_options(seam, name)
    required = [key for key, parameter in known.items() if parameter.default is parameter.empty]
    return {
        "type": "object",
        "properties": {key: _make_option_schema(parameter) for key, parameter in known.items()},
        "additionalProperties": False,
        **({"required": required} if required else {}),
    }


def _make_option_schema(parameter: inspect.Parameter) -> dict[str, Any]:
    schema = TypeAdapter(parameter.annotation).json_schema()
    has_default = parameter.default is not parameter.empty and parameter.default is not None
    return {**schema, **({"default": json.loads(json.dumps(parameter.default))} if has_default else {})}


def _list_learner_schemas() -> Iterator[dict[str, Any]]:
    """Yield the schema of a ``[[learner]]`` table of each kind, and of one that an import path names."""
    texts = describe_fields(LearnerSettings)
    tables = {"meta": _make_own_schema(MetaSettings, "meta"), "inner": _make_own_schema(InnerSettings, "inner")}
    name = {"type": "string", "pattern": r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$", "description": texts["name"]}
    own = {"name": name, **{key: {**table, "description": texts[key]} for key, table in tables.items()}}
    for kind in registry.names(LEARNERS.package):
        properties = {"kind": {"const": kind}, **own, "options": make_options_schema(LEARNERS, kind)}
        yield {"type": "object", "properties": properties, "required": ["kind"], "additionalProperties": False}
    properties = {"kind": {"type": "string", "pattern": IMPORT_PATH}, **own, "options": {"type": "object"}}
    yield {"type": "object", "properties": properties, "required": ["kind"], "additionalProperties": False}


def _make_own_schema(kind: type[Any], section: str) -> dict[str, Any]:
    """Return the schema of the keys of a ``section`` that a learner may have of its own."""
    schema = TypeAdapter(kind).json_schema()
    _add_texts(schema, kind, section)
    for seam in (RULE, POSTERIOR, GRADIENT, SCHEDULE, REPLAY):
        if seam.section == section:
            _add_seam(schema, seam)
    properties = {key: value for key, value in schema["properties"].items() if key not in RUN_KEYS}
    return {"type": "object", "properties": properties, "additionalProperties": False}


def _list_source_schemas() -> Iterator[dict[str, Any]]:
    name = {"type": "string", "description": "the name of the source; by default its kind"}
    choices = [*get_args(OutlierRule)]
    outliers = {"enum": choices, "default": choices[0], "description": "whether to refuse far too large numbers"}
    for kind in registry.names(streams.sources):
        settings = get_type_hints(registry.load(streams.sources, kind))["settings"]
        schema = TypeAdapter(settings).json_schema()
        _add_texts(schema, settings, f"source, kind = {kind!r}")
        shared = schema.pop("$defs", {})
        for key, table in get_type_hints(settings).items():
            if (item := find_named_type(table)) is not None:
                _add_texts(shared[item.__name__], item, f"source.{key}.NAME")
                schema["properties"][key]["additionalProperties"] = shared[item.__name__]
        properties = {"kind": {"const": kind}, "name": name, "outliers": outliers, **schema["properties"]}
        yield {**schema, "properties": properties, "required": ["kind", *schema.get("required", ())]}
    own = {"kind": {"type": "string", "pattern": IMPORT_PATH}, "name": name, "outliers": outliers}
    yield {"type": "object", "properties": own, "required": ["kind"]}
