"""Render the results as Markdown."""

from collections.abc import Mapping
from typing import Any

from tests.benchmarks.contestants import PACKAGES
from tests.benchmarks.goals import compute_ratio, format_goal_lines, format_verdict

GOALS = ["", "| goal | found | at most | verdict |", "|---|---|---|---|"]
HEAD = (
    "| contestant | time | spread | time / unrolled | time / JAX | peak memory | memory / unrolled | counted by "
    "| error | cold start | compiling |"
)


def render(result: Mapping[str, Any]) -> str:
    """Return the page with all sections that have results."""
    about, machine = result["about"], result["about"]["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    text = [
        "# Speed and memory next to peers",
        "",
        f"`{about['command']}`, commit {about['commit']}, {about['wall_seconds'] / 60:.0f} minutes.",
        f"{machine['processor']}, {machine['system']}; one core and one thread for every contestant;",
        f"load average {machine['load_before']:.2f} before.",
        f"{versions}.",
        "",
        *NOTES,
        "",
        f"![Ratios to the unrolled loop, and memory by the number of steps]({about['plot']})",
    ]
    for work in result["works"].values():
        text += ["", *_render_work(work, result.get("imports", {}))]
    if "growth" in result:
        text += ["", *_render_growth(result["growth"])]
    if "first_start" in result:
        text += ["", *_render_first_start(result["first_start"])]
    return "\n".join([*text, ""])


NOTES = (
    "All contestants of a section compute the same mean meta-gradient of MAML in float32. Each is first checked",
    "against float64 (*error*: relative, over the loss and all gradients). The contestants take turns within each",
    "round. *Time* is the median over the rounds, *spread* the interquartile range divided by it. *Peak memory* is",
    "what a call adds: the bytes of every tensor as it is allocated and freed; for compiled programs, where tensors",
    "are not visible, the resident pages that a call adds in a fresh process; for JAX, the sum of temporaries and",
    "outputs that XLA reports. *Cold start* is the import plus the first call; *compiling* is the part of it that",
    "later calls do not repeat (ours includes tracing). *Unrolled* is the plain loop over tasks with",
    "`torch.autograd.grad(create_graph=True)`. JAX is `jit` of `vmap` over tasks for the sinusoid, and a loop over",
    "tasks of a jitted function elsewhere.",
)


def _render_work(work: Mapping[str, Any], imports: Mapping[str, float | None]) -> list[str]:
    text = [f"## {work['title']}", ""]
    if work["scale"] != 1:
        text += [
            f"Measured on {work['timed']} of the {work['tasks']} tasks. The time is scaled up, because all contestants",
            "process one task at a time. The peak is that of the measured tasks.",
            "",
        ]
    text += [HEAD, "|" + "---|" * (HEAD.count("|") - 1)]
    rows = {row["contestant"]: row for row in work["rows"]}
    for name, row in rows.items():
        if "failed" in row:
            text.append(f"| {name} | {row['failed'].replace('|', '/')} |" + " |" * (HEAD.count("|") - 3))
            continue
        shares = [compute_ratio(rows, name, *pair) for pair in (("seconds", "unrolled"), ("seconds", "JAX"))]
        figures = [
            format_seconds(row["seconds"]),
            f"{row['spread']:.0%}",
            *map(format_ratio, shares),
            format_bytes(row["bytes"]),
        ]
        loaded = imports.get(PACKAGES.get(name, "online_meta"))
        figures += [
            format_ratio(compute_ratio(rows, name, "bytes", "unrolled")),
            row["bytes_by"],
            f"{row['error']:.0e}",
        ]
        figures += [
            format_seconds(None if loaded is None else loaded + row["first_call"]),
            format_seconds(row["compiling"]),
        ]
        text.append(f"| {name} | {' | '.join(figures)} |")
    return text + ([*GOALS, *format_goal_lines(work)] if work["goals"] else [])


def _render_growth(growth: Mapping[str, Any]) -> list[str]:
    text = [
        "## Peak memory of the transformer by the number of inner steps",
        "",
        f"The parameters that adapt take {format_bytes(growth['parameters'])}. The peak counts live tensors.",
        "",
        "| K | " + " | ".join(map(str, growth["steps"])) + " |",
        "|---|" + "---|" * len(growth["steps"]),
        *(f"| {name} | " + " | ".join(map(format_bytes, peaks)) + " |" for name, peaks in growth["peaks"].items()),
    ]
    named = {
        "per_step": "growth per step / bytes of the parameters that adapt",
        "exponent": "rematerialised: p of the fit a + b K^p",
    }
    text += GOALS
    for key, what in named.items():
        most = growth["goals"][key]
        text.append(f"| {what} | {growth[key]:.3g} | {most:g} | {format_verdict(growth[key], most)} |")
    return text


def _render_first_start(start: Mapping[str, Any]) -> list[str]:
    text = ['## First start to first step, `how="auto"`, sinusoid, K = 5', ""]
    if "failed" in start:
        return [*text, f"Not measured: {start['failed']}"]
    return [
        *text,
        "On all cores of the machine; the compiler runs in the background, at low priority.",
        "",
        "| what | seconds |",
        "|---|---|",
        f"| `import online_meta` | {start['import']:.2f} |",
        f"| process start to the end of the first meta-step | {start['first_step']:.2f} |",
        f"| process start to the compiled program's first step | {format_seconds(start['compiled_after'])} |",
        f"| a meta-step before that | {format_seconds(start['step_before'])} |",
        f"| a meta-step after that | {format_seconds(start['step_after'])} |",
        "",
        "The log of this run: " + "; ".join(f"*{line}*" for line in start["log"]) + ".",
    ]


def format_seconds(value: float | None) -> str:
    """Format a time with a suitable unit."""
    if value is None:
        return "-"
    return f"{value:.3g} s" if value >= 1 else f"{value * 1e3:.3g} ms"


def format_bytes(value: float | None) -> str:
    """Format a number of bytes with a suitable unit."""
    if value is None:
        return "-"
    unit = next((unit for unit in ((1e9, "GB"), (1e6, "MB")) if value >= unit[0]), (1e3, "kB"))
    return f"{value / unit[0]:.3g} {unit[1]}"


def format_ratio(value: float | None) -> str:
    """Format a ratio with three significant digits."""
    return "-" if value is None else f"{value:.3g}"
