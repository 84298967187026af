"""The reference page of the configuration: every section, every key, and the options of every named entry."""

from collections.abc import Iterator
from typing import get_type_hints

import streams.sources
from deploy.config.config import Config
from deploy.config.describe import Key, describe_type, format_toml, list_keys, list_sections
from online_meta import registry
from streams.tables.declared_columns import DeclaredColumn
from trainers.seams import SEAMS, Seam, list_options
from trainers.settings import LearnerSettings

INTRODUCTION = """# Configuration

A run is configured by one TOML file. `online-meta config --example` prints one with every key, `online-meta config
--schema` a JSON Schema, with which an editor completes and checks the file: write the schema to a file, and name it in
the first line of the configuration.

```toml
#:schema online-meta.schema.json
```

`online-meta serve CONFIG --set section.key=value` replaces a value. A key marked *fixed* decides the parameters that a
run learns: a restart with another value is refused. Wherever a key names an entry of a registry, it may also be the
import path of a function, `package.module:name`; modules in the folder of the configuration file are found, too. Other
packages add names through entry points of the groups `online_meta.rules`, `online_meta.metagrads`,
`online_meta.schedules`, `online_meta.replay`, `online_meta.learners`, `online_meta.posteriors`,
`online_meta.outcomes`, `online_meta.comparators`, `online_meta.engines`, `online_meta.sources` and
`online_meta.metrics`.
"""


def render_configuration() -> str:
    """Return the page as Markdown."""
    return "\n".join([INTRODUCTION, *_sections(), *_learners(), *_sources()])


def _sections() -> Iterator[str]:
    for section, kind, keys in list_sections(Config):
        yield f"## `[{section}]`\n"
        yield _plain((kind.__doc__ or "").split("\n\n")[0]) + "\n"
        if keys:
            yield _table(keys)
        for seam in SEAMS:
            if seam.section == section and seam.options:
                yield _options(seam)


def _table(keys: list[Key]) -> str:
    fixed = any(key.changeable is not None for key in keys)
    head = "| key | default | type and range | " + ("restart | " if fixed else "") + "meaning |"
    lines = [head, "|---" * (head.count("|") - 1) + "|"]
    for key in keys:
        default = "required" if key.default is None else f"`{key.default}`" if key.default else "not set"
        restart = f"{'may change' if key.changeable else 'fixed'} | " if fixed else ""
        lines.append(f"| `{key.name}` | {default} | {_cell(key.type)} | {restart}{_cell(_plain(key.description))} |")
    return "\n".join(lines) + "\n"


def _options(seam: Seam) -> str:
    where = f"`{seam.options}`" if seam.key not in ("baselines", "comparator") else f"`[regret.{seam.options}.NAME]`"
    lines = [f"### Names of `{seam.key}`\n", f"The options belong into {where}.\n", "| name | options and defaults |"]
    lines.append("|---|---|")
    for name in registry.names(seam.package):
        options = [
            f"`{key}`"
            + (" (required)" if parameter.default is parameter.empty else f" = `{_default(parameter.default)}`")
            + f" ({_cell(describe_type(parameter.annotation))})"
            for key, parameter in list_options(seam, name).items()
        ]
        lines.append(f"| `{name}` | {', '.join(options) or 'none'} |")
    return "\n".join(lines) + "\n"


def _learners() -> Iterator[str]:
    yield "## `[[learner]]`\n"
    yield (
        "One table for each learner, all of which play every round; the first one leads. Without such a table there is "
        "one, FTML. The `baselines` of `[regret]` follow. See [Several learners](../how-to/several-learners.md).\n"
    )
    yield _table(list_keys(LearnerSettings, "learner"))
    yield "The names of `kind` and their options are those of [`baselines`](#names-of-baselines).\n"


def _sources() -> Iterator[str]:
    yield "## `[[source]]`\n"
    yield (
        "One table for each source of tasks. `kind` is required; `name`, by default the kind, begins the ids of tasks "
        'and labels metrics. `outliers` is "accept", the default, or "quarantine", see [Handle bad '
        "input](../how-to/bad-input.md#outliers).\n"
    )
    for kind in registry.names(streams.sources):
        settings = get_type_hints(registry.load(streams.sources, kind))["settings"]
        yield f'### `kind = "{kind}"`\n'
        keys = list_keys(settings, f"source.{kind}")
        yield _table(keys) if keys else "No further keys.\n"
    yield "## `[source.columns.NAME]`\n"
    yield "One table for each declared column of rows, see [Read the rows of a table](../how-to/tables.md).\n"
    yield _table(list_keys(DeclaredColumn, "source.columns.NAME"))


def _default(value: object) -> str:
    return format_toml(value) or "not set"


def _plain(text: str) -> str:
    return " ".join(text.replace("``", "`").split())


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
