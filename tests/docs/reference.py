"""Generate the reference pages of the documentation: ``python -m tests.docs.reference``.

Without options it writes the pages of ``docs/reference/`` that differ. With ``--check`` it writes nothing, names the
pages that differ from what the code says, and exits with 1 if there is one.
"""

import argparse
import re
import sys
from collections.abc import Callable, Iterable
from inspect import cleandoc
from pathlib import Path
from typing import Any

import click
from fastapi import FastAPI

from deploy import exits
from deploy.cli import group
from deploy.server import entities, routes
from deploy.server.app import OPEN_PATHS, OPEN_PREFIXES
from deploy.telemetry import prometheus
from deploy.telemetry.metrics import Metric
from tests.docs.configuration_page import render_configuration
from tests.docs.pages import DOCS

FOLDER = DOCS / "reference"

NOTICE = "<!-- Generated from the code: do not edit. `make reference` writes this page. -->"

EXIT_CODES = {
    "DONE": "Success, or the daemon has drained.",
    "USAGE": "Wrong usage: an unknown command or option, or a value outside its range.",
    "BROKEN": "An internal error, or damaged data.",
    "TRY_LATER": "A temporary failure: a port, a broker, a daemon or the disk is not available. Try again later.",
    "CONFIG": "The configuration or a file format is invalid.",
}
"""The meaning of each exit code, by its name in ``deploy.exits``."""

LABELS = {
    "source": "The `name` of a `[[source]]`.",
    "reason": "Of a refused task: a reason of [Handle bad input](../how-to/bad-input.md#reasons). "
    "Of a skipped meta-step: `not_finite`.",
    "learner": "The meta-learner or a baseline.",
    "level": "The probability of the interval, such as `0.9`.",
    "points": "The number of support samples that the learner adapted to.",
    "against": "The comparator or baseline that the regret is measured against.",
    "comparator": "The comparator that was refreshed.",
    "stage": "`before` or `after` adaptation.",
    "end": "`low` or `high`.",
    "verdict": "`ahead`, `behind`, `level` or `too early`.",
    "kind": "`duplicates`: the content of an earlier round; `overlaps`: support and query share samples.",
    "expert": "An answer that the pool mixes, such as `ftml@10`.",
    "state": "`pays`, `does_not` or `too_early`.",
    "rank": "The number of the rank, from 0.",
    "version": "The version of online-meta.",
    "torch": "The version of PyTorch.",
    "engine": "The kind of engine.",
    "check": "The name of a check, see [Health](../how-to/health.md#checks).",
}
"""The values of each label of a metric."""

TAGS = {
    "Tasks": "Send tasks, and ask what became of them. [Serve a run](../how-to/serve.md#send-a-task) shows how to make "
    "a body, [Handle bad input](../how-to/bad-input.md) has the limits and all reasons for a refusal.",
    "Meta-parameters": "Use what the run has learned so far.",
    "Entities": "A task may belong to an entity, such as a store or a patient: its id is then `SOURCE..KEY..AT`, where "
    "bytes of the key other than ASCII letters, digits, `:` and `-` are written as `_` and two hexadecimal digits.",
    "The run": "Read the state of the run and its regret. [Watch a run](../how-to/watching.md) is about metrics, and "
    "[Health](../how-to/health.md) about the checks.",
    "Probes": "For a supervisor or a load balancer. `/healthz` needs no token. [Probes](../how-to/health.md#probes) "
    "shows how to use them, and how to give them a listener of their own.",
}
"""The introduction of each group of paths."""


def render_command_line() -> str:
    """Return the page of the command line: each command with its arguments and options, and the exit codes."""
    context = click.Context(group, info_name="online-meta")
    commands: dict[str, click.Command] = {}
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        commands[name] = command
        if isinstance(command, click.Group):
            commands |= {f"{name} {sub}": one for sub, one in command.commands.items()}
    parts = [
        "# Command line",
        NOTICE,
        (
            "`online-meta COMMAND --help` shows the same. `online-meta --version` prints the version. "
            "[Serve a run](../how-to/serve.md) shows the commands at work."
        ),
        _table(
            ("command", "what it does"),
            (
                [
                    f"[`{name}`](#online-meta-{name.replace(' ', '-')})",
                    _mark_code(_paragraphs(one)[0], _argument_names(one)),
                ]
                for name, one in commands.items()
            ),
        ),
    ]
    for name, command in commands.items():
        parts += _command_section(name, command, context)
    codes = {name: value for name, value in vars(exits).items() if name in EXIT_CODES}
    rows = [[str(value), EXIT_CODES[name]] for name, value in sorted(codes.items(), key=lambda item: item[1])]
    parts += ["## Exit codes", _table(("code", "meaning"), [*rows, ["130", "The command was interrupted by Ctrl-C."]])]
    return _page(parts)


def _command_section(name: str, command: click.Command, parent: click.Context) -> list[str]:
    context = click.Context(command, info_name=name, parent=parent)
    described = command.to_info_dict(context)["params"]
    parts = [
        f"## online-meta {name}",
        f"```text\n{' '.join(['online-meta', name, *command.collect_usage_pieces(context)])}\n```",
        *(_mark_code(text, _argument_names(command)) for text in _paragraphs(command)),
    ]
    rows = []
    for option, info in zip(command.get_params(context), described, strict=True):
        if isinstance(option, click.Option) and not option.hidden and option.expose_value:
            value = "" if option.is_flag else f" {_value_of(option, context)}"
            shown = ", ".join(f"`{one}{value}`" for one in (*option.opts, *option.secondary_opts))
            rows.append([shown, _default_of(option, info), _option_text(option) + _range_of(info["type"])])
    return [*parts, _table(("option", "default", "meaning"), rows)] if rows else parts


def _paragraphs(command: click.Command) -> list[str]:
    return [" ".join(text.split()) for text in cleandoc(command.help or "").split("\n\n")]


def _argument_names(command: click.Command) -> list[str]:
    return [str(one.name).upper() for one in command.params if isinstance(one, click.Argument)]


def _value_of(option: click.Option, context: click.Context) -> str:
    if option.metavar is not None:
        return option.metavar
    return str(option.make_metavar(context)).replace(" RANGE", "")


def _option_text(option: click.Option) -> str:
    text = (option.help or "").rstrip(".")
    return f"{_mark_code(text)}."


def _default_of(option: click.Option, info: dict[str, Any]) -> str:
    default = info["default"]
    if option.required:
        return "required"
    if option.multiple:
        return "may be repeated"
    return f"`{default:g}`" if isinstance(default, int | float) and not option.is_flag else ""


def _range_of(kind: dict[str, Any]) -> str:
    low, high = kind.get("min"), kind.get("max")
    if low is not None and high is not None:
        return f" From {low} to {high}."
    return f" At least {low}." if low is not None else f" At most {high}." if high is not None else ""


def render_http() -> str:
    """Return the page of the HTTP API: each path with its parameters, its body and its responses."""
    described = _openapi()
    open_paths = ", ".join(f"`{path}`" for path in OPEN_PATHS) + " and all that begin with "
    open_paths += ", ".join(f"`{prefix}`" for prefix in OPEN_PREFIXES)
    groups: dict[str, list[str]] = {tag: [] for tag in TAGS}
    for path, methods in described["paths"].items():
        for method, operation in methods.items():
            groups[_tag_of(path)] += _operation_section(method.upper(), path, operation, described)
    parts = [
        "# HTTP",
        NOTICE,
        (
            "A running daemon serves this API. Its page `/docs` is interactive, and `/openapi.json` describes it in "
            "the format of OpenAPI."
        ),
        "## In general",
        (
            "If the configuration names a `token_file`, every request needs the header `Authorization: Bearer TOKEN`. "
            f"The exceptions are {open_paths}. "
            "[Serve a run](../how-to/serve.md#open-the-daemon-to-other-machines) shows how to set the token and TLS."
        ),
        (
            "An error is a JSON object with a `reason`, which is a fixed slug, and a `detail`, which is a sentence. "
            "Apart from the responses below, every path can answer:"
        ),
        _table(
            ("status", "reason", "meaning"),
            [
                ["401", "`unauthorized`", "The token is missing or wrong."],
                ["403", "`foreign_origin`", "A web page of another origin sent the request."],
                ["404", "`not_found`", "There is no such path."],
                ["405", "`wrong_method`", "The path does not have this method."],
                ["421", "`unknown_host`", "The header Host names none of the daemon's hosts; see `[serve] hosts`."],
                ["422", "`bad_parameter`", "A parameter is not of its type, or outside its range."],
                ["500", "`history_damaged`", "A checksum of the history does not match its data."],
            ],
        ),
        "These paths serve pages and text:",
        _table(
            ("path", "content"),
            [
                ["`/`", "The dashboard."],
                ["`/docs`", "The interactive page of this API."],
                ["`/openapi.json`", "This API in the format of OpenAPI."],
                ["`/metrics`", "The [metrics](metrics.md) for Prometheus."],
            ],
        ),
    ]
    for tag, sections in groups.items():
        parts += [f"## {tag}", TAGS[tag], *sections]
    return _page(parts)


def _openapi() -> dict[str, Any]:
    """Return the OpenAPI document of the daemon's routes, without a running daemon."""
    app = FastAPI(title="online-meta")
    app.include_router(routes.router)
    app.include_router(entities.router)
    return app.openapi()


def _tag_of(path: str) -> str:
    if path.startswith("/v1/tasks"):
        return "Tasks"
    if path.startswith("/v1/entities"):
        return "Entities"
    if path in ("/v1/adapt", "/v1/weights"):
        return "Meta-parameters"
    return "The run" if path.startswith("/v1/") else "Probes"


def _operation_section(method: str, path: str, operation: dict[str, Any], described: dict[str, Any]) -> list[str]:
    parts = [f"### {method} {path}", *(" ".join(text.split()) for text in operation["description"].split("\n\n"))]
    if "requestBody" in operation:
        parts.append(f"Request body: {_contents(operation['requestBody']['content'])}.")
    if parameters := operation.get("parameters", []):
        rows = [
            [f"`{one['name']}`", one["in"], _type_of(one["schema"]), _default_parameter(one), _parameter_text(one)]
            for one in parameters
        ]
        parts.append(_table(("parameter", "in", "type", "default", "meaning"), rows))
    responses = []
    for status, response in sorted(operation["responses"].items()):
        if "HTTPValidationError" not in str(response):  # FastAPI's own; the daemon answers `bad_parameter`
            text = response["description"].replace("Successful Response", "Success")
            responses.append([status, f"{text}.", _contents(response.get("content", {}), described)])
    return [*parts, _table(("status", "meaning", "body"), responses)]


def _contents(contents: dict[str, Any], described: dict[str, Any] | None = None) -> str:
    """Return the media types of a body and the fields of a JSON object; skip an empty JSON schema among others."""
    shown = []
    for media, content in contents.items():
        schema = content.get("schema", {})
        if fields := schema.get("properties"):
            shown.append("JSON: " + ", ".join(f"`{name}`" for name in fields))
        elif media == "application/json":
            if len(contents) == 1:
                shown.append("JSON")
        else:
            shown.append(f"`{media}`")
    return ", or ".join(shown)


def _type_of(schema: dict[str, Any]) -> str:
    if "anyOf" in schema:
        return " or ".join(_type_of(one) for one in schema["anyOf"] if one.get("type") != "null")
    limits = {"min": schema.get("minimum"), "max": schema.get("maximum")}
    return schema["type"] + _range_of(limits).lower().rstrip(".").replace(" from", ", from").replace(" at", ", at")


def _default_parameter(parameter: dict[str, Any]) -> str:
    if parameter["required"]:
        return "required"
    default = parameter["schema"].get("default")
    return "" if default is None else f"`{default}`"


def _parameter_text(parameter: dict[str, Any]) -> str:
    known = {"idempotency-key": "the id of the task", "id": "the id of the task"}
    text = parameter.get("description") or known[parameter["name"]]
    return f"{text[0].upper()}{text[1:]}."


def render_metrics() -> str:
    """Return the page of the metrics: a table for each module of ``deploy.telemetry.metrics``, and the labels."""
    parts = [
        "# Metrics",
        NOTICE,
        (
            "`GET /metrics` of the daemon, in the format of Prometheus. [Watch a run](../how-to/watching.md) explains "
            "how to use them."
        ),
        (
            "The name of a metric ends in its unit: `_seconds`, `_bytes`, or `_ratio` for a share from 0 to 1. The "
            "name of a counter ends in `_total`. A loss has the unit of the run's loss. A gauge without a value is NaN."
        ),
    ]
    for module in prometheus.MODULES:
        title, _, rest = (module.__doc__ or "").strip().partition("\n")[0].rstrip(".").partition(": ")
        parts.append(f"## {title}")
        if rest:
            parts.append(f"{rest[0].upper()}{rest[1:]}.")
        parts.append(_table(("metric", "kind", "meaning"), (_metric_row(metric) for metric in module.METRICS)))
        parts += [
            f"Upper bounds of the buckets of `{metric.name}`: {', '.join(f'{bound:g}' for bound in metric.buckets)}."
            for metric in module.METRICS
            if metric.buckets
        ]
    used = dict.fromkeys(label for metric in prometheus.METRICS for label in metric.labels)
    parts += ["## Labels", _table(("label", "value"), ([f"`{label}`", LABELS[label]] for label in sorted(used)))]
    return _page(parts)


def _metric_row(metric: Metric) -> list[str]:
    labels = f"{{{', '.join(metric.labels)}}}" if metric.labels else ""
    return [f"`{metric.name}{labels}`", metric.kind, metric.help]


def _page(parts: Iterable[str]) -> str:
    return "\n\n".join(parts) + "\n"


def _table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    header = list(header)
    lines = [header, ["---"] * len(header), *([cell.replace("|", r"\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |".replace("|  |", "| |").replace("|  |", "| |") for line in lines)


CODE = re.compile(
    r"`[^`]*`|--[a-z][a-z-]*|\w+://[^\s,;]*[^\s,.;:)]|\b[A-Z]+(?:/\w+)+|\b[a-z]+/[a-z-]*[A-Z][A-Z-]*|\b[A-Za-z]\w*_\w+"
)


def _mark_code(text: str, names: Iterable[str] = ()) -> str:
    """Return plain text as Markdown: options, addresses, paths, names with an underscore and ``names`` become code."""
    found = "|".join([CODE.pattern, *(rf"\b{re.escape(name)}\b" for name in names)])
    return re.sub(found, lambda match: f"`{match[0].strip('`')}`", text)


PAGES: dict[str, Callable[[], str]] = {
    "command-line.md": render_command_line,
    "configuration.md": render_configuration,
    "http.md": render_http,
    "metrics.md": render_metrics,
}
"""The functions that return the text of the generated pages, by file name."""


def list_stale(folder: Path) -> list[str]:
    """Return the names of the pages in ``folder`` that are missing or differ from what the code says."""
    stale = []
    for name, render in PAGES.items():
        page = folder / name
        if not page.exists() or page.read_text(encoding="utf-8") != render():
            stale.append(name)
    return stale


def write_stale(folder: Path) -> list[str]:
    """Write the pages in ``folder`` that differ; return their names."""
    stale = list_stale(folder)
    for name in stale:
        (folder / name).write_text(PAGES[name](), encoding="utf-8")
    return stale


def main(arguments: list[str] | None = None) -> int:
    """Write or check the pages; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.docs.reference", description=cleandoc(__doc__ or ""))
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a page is stale")
    if not parser.parse_args(arguments).check:
        for name in write_stale(FOLDER):
            print(f"written: docs/reference/{name}")
        return 0
    stale = list_stale(FOLDER)
    for name in stale:
        print(f"docs/reference/{name} is stale: run make reference", file=sys.stderr)
    return int(bool(stale))


if __name__ == "__main__":
    sys.exit(main())
