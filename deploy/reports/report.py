"""Write the report of a run: report.json for programs, report.html and regret.png for people."""

import io
import json
import math
import platform
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jinja2 import Environment, PackageLoader, select_autoescape
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from pydantic import TypeAdapter
from rich.console import Group
from rich.table import Table
from rich.text import Text

from deploy.config.config import Config
from deploy.telemetry.run_view import RunView
from deploy.telemetry.series import regret_series
from online_meta.regret.verdict import LITTLE_WEIGHT, display_name
from streams.atomic_files import replace_file
from trainers.comparators import describe_target, is_exact

INKS = ("#0b66c3", "#c2500a", "#00856a", "#a8388f", "#8a6d00", "#5b4bc4", "#7a4a2b")
DARK = "#2b3440"
MUTED = "#6b7685"
"""The dashboard's colours --ink-0 to --ink-6, --ink-dark and --ink-muted under the light theme."""


WINDOW = 20


def plot_regret(series: dict[str, Any]) -> bytes:
    """Plot losses and regret over the rounds.

    Args:
        series: result of ``series.regret_series``.

    Returns:
        The bytes of a PNG.
    """
    figure = Figure(figsize=(11, 4.4), dpi=130, layout="constrained")
    losses, regrets = figure.subplots(1, 2)
    rounds = np.array(series["rounds"], int) + 1  # Rounds are counted from 1, as on the page.
    kinds = order_comparators(point["kind"] for point in series["comparators"])
    colours = assign_colours(series["learners"], kinds)
    leader = display_name(series["leader"])
    for name, curves in series["learners"].items():
        label = display_name(name)
        losses.plot(rounds, trailing_mean(curves["loss"]), color=colours[name], label=label)
        if "regret" in curves:
            regrets.plot(rounds, curves["regret"], color=colours[name], label=f"against {label}")
    losses.plot(rounds, trailing_mean(series["loss_before"]), color=MUTED, ls="--", label=f"{leader} before adaptation")
    for kind, mark in zip(kinds, "osD^v" * 9, strict=False):
        found = [point for point in series["comparators"] if point["kind"] == kind]
        at, values, errors = zip(*((c["as_of_round"], c["regret"], c["standard_error"]) for c in found), strict=True)
        label = f"against {kind.replace('_', ' ')} ({'exact' if found[-1]['exact'] else 'estimate'})"
        style = {"fmt": f"{mark}-", "color": colours[kind], "markersize": 4, "capsize": 2}
        regrets.errorbar(at, values, errors, label=label, **style)
    _label_axes(losses, f"Loss on new tasks (mean of {WINDOW} points)", "query loss")
    _label_axes(regrets, f"Regret: cumulative loss of {leader} minus the other's", "regret")
    regrets.axhline(0, color="#888888", lw=0.8)
    return as_png(figure)


def order_comparators(kinds: Iterable[str]) -> list[str]:
    """Return each kind of comparator once: hindsight first, the rest in alphabetical order, as on the page."""
    return sorted(set(kinds), key=lambda kind: (kind != "hindsight", kind))


def assign_colours(learners: Iterable[str], comparators: Iterable[str]) -> dict[str, str]:
    """Return the colour of each learner and comparator, the same as on the page (palette.js).

    Args:
        learners: the leading one first, the rest in the order of the configuration.
        comparators: from ``order_comparators``.
    """
    colours = {name: INKS[at % len(INKS)] for at, name in enumerate(learners)}
    for at, name in enumerate(comparators):
        colours[name] = DARK if at == 0 else INKS[len(INKS) - 1 - (at - 1) % len(INKS)]
    return colours


def as_png(figure: Figure, dpi: float | Literal["figure"] = "figure") -> bytes:
    """Return a figure as the bytes of a PNG; ``dpi`` is by default that of the figure."""
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=dpi)
    return picture.getvalue()


def style_axes(axes: Axes) -> None:
    """Add a light grid to axes and remove the top and right border."""
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def trailing_mean(values: list[float | None]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Return the mean of each value and up to ``WINDOW`` - 1 values before it; None values are ignored."""
    means = []
    for end in range(1, len(values) + 1):
        known = [value for value in values[max(end - WINDOW, 0) : end] if value is not None]
        means.append(math.fsum(known) / len(known) if known else math.nan)
    return np.array(means)


def _label_axes(axes: Axes, title: str, unit: str) -> None:
    axes.set_title(title, fontsize=11)
    axes.set_xlabel("round")
    axes.set_ylabel(unit)
    style_axes(axes)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=9)


MANY, SHOWN = 8, 6
"""A table of more than ``MANY`` answers shows some ``SHOWN`` of them."""


LIBRARIES = ("online-meta", "torch", "numpy", "safetensors")


POINTS = 600


def write_report(folder: Path, view: RunView, config: Config, epoch: int = 0) -> dict[str, Any]:
    """Write report.json, report.html and regret.png.

    Args:
        folder: to write to.
        view: of the run.
        config: of the run.
        epoch: the number of entities that were erased from the history before it was played; the report says it if
            there are any.

    Returns:
        The content of report.json.

    Raises:
        OSError: if a file cannot be written.
    """
    report = make_report(view, config) | ({"epoch": epoch} if epoch else {})
    replace_file(folder / "report.json", json.dumps(report, indent=1, allow_nan=False).encode(), durable=False)
    picture = plot_regret(regret_series(view, 0, None, POINTS))
    replace_file(folder / "regret.png", picture, durable=False)
    pages = Environment(loader=PackageLoader("deploy", "templates"), autoescape=select_autoescape())
    kinds = order_comparators(name for name, regret in report["regret"].items() if regret["kind"] != "baseline")
    page = pages.get_template("report.html").render(
        report=report,
        folder=folder,
        verdict=report["verdict"],
        comparisons=compare_with_others(report),
        learners=put_pool_first(report),
        colours=assign_colours(report["learners"], kinds),
        leader=find_leading(report),
        display_name=display_name,
    )
    replace_file(folder / "report.html", page.encode(), durable=False)
    return report


def make_report(view: RunView, config: Config) -> dict[str, Any]:
    """Return the content of report.json.

    Args:
        view: of the run.
        config: of the run.
    """
    return {
        "rounds": view.learned(),
        "skipped": view.skipped,
        "quarantined": view.quarantined,
        "leaks": view.leaks(),
        "checkpoint": view.newest_checkpoint(),
        "leader": view.ledger.leader,
        "learners": view.learners(),
        "regret": view.regret(),
        "verdict": view.verdict(),
        "config": TypeAdapter(Config).dump_python(config, mode="json"),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in LIBRARIES}},
    }


def verdicts(report: dict[str, Any]) -> list[str]:
    """Return whether meta-learning pays, which learners can be switched off, and ``compare_with_others``.

    Args:
        report: result of ``make_report``.
    """
    verdict = report.get("verdict", {})  # A report of 0.1.0 has none.
    return [*(verdict[key] for key in ("sentence", "advice") if verdict.get(key)), *compare_with_others(report)]


def compare_with_others(report: dict[str, Any]) -> list[str]:
    """Return a sentence for each baseline and comparator that compares the leader with it, and one on what is left out.

    Of many baselines, they are those of ``choose_shown``; the tables have the others.

    Args:
        report: result of ``make_report``.
    """
    leader, shown = find_leading(report), choose_shown(report["learners"], report.get("verdict", {}))
    sentences = [
        _compare_with_baseline(leader, against, regret)
        if regret["kind"] == "baseline"
        else _compare_with_comparator(against, regret)
        for against, regret in report["regret"].items()
        if regret["kind"] != "baseline" or against in shown
    ]
    return [*sentences, *_describe_exceptions(report)]


def put_pool_first(report: dict[str, Any]) -> dict[str, Any]:
    """Return the learners of a report in the order of its tables: the pool, the one that leads, the rest."""
    learners = report["learners"]
    first = report.get("verdict", {}).get("reference", next(iter(learners)))
    return {first: learners[first], **learners}


def choose_shown(learners: dict[str, Any], verdict: dict[str, Any]) -> dict[str, Any]:
    """Return the answers that a table shows: the pool first, and of more than ``MANY`` only those that matter.

    These are the pool, the answer that leads, the best that does not learn across tasks, and those with most of the
    pool's weight, as on the page (pool.js).

    Args:
        learners: of ``/v1/status``, the leading one first.
        verdict: of ``/v1/status``; {} if there is none.
    """
    names, weights = [*learners], verdict.get("weights", {})
    if not names:
        return {}
    if len(names) > MANY:
        needed = {names[0], verdict.get("reference"), verdict.get("best_without")}
        rest = sorted((name for name in names if name not in needed), key=lambda name: -weights.get(name, 0.0))
        kept = rest[: SHOWN + 1 - len(needed)]
        needed |= {name for name in kept if not weights or weights.get(name, 0.0) >= LITTLE_WEIGHT}
        names = [name for name in names if name in needed]
    first = verdict.get("reference", names[0])
    return {first: learners[first], **{name: learners[name] for name in names}}


def find_leading(report: dict[str, Any]) -> str:
    """Return the display name of the learner that leads: the first one in a report."""
    return display_name(next(iter(report["learners"])))


def _compare_with_baseline(leader: str, against: str, regret: dict[str, Any]) -> str:
    name, rounds = display_name(against), regret.get("rounds", regret["as_of_round"])
    per_round = regret["value"] / max(rounds, 1)
    if "verdict" not in regret:  # A report of 0.1.0.
        side = "lower" if per_round < 0 else "higher"
        return (
            f"The loss of {leader} is {abs(per_round):.3f} {side} per round than that of {name}, over {rounds} rounds."
        )
    low, high = (end / max(rounds, 1) for end in regret["interval"] or (0.0, 0.0))
    interval = f" (95 % interval at all times: {low:+.3f} to {high:+.3f})" if regret["interval"] else ""
    return f"{leader} against {name}: {regret['verdict']}. {per_round:+.3f} per round{interval}, over {rounds} rounds."


def _compare_with_comparator(against: str, regret: dict[str, Any]) -> str:
    rounds = regret.get("rounds", regret["as_of_round"])
    error = f" (standard error {regret['standard_error']:.1f})" if regret["standard_error"] else ""
    first = f", over the rounds from {regret['first_round'] + 1} on" if regret.get("first_round") else ""
    return (
        f"Against the {display_name(against)} comparator, as of round {regret['as_of_round']}{first}, the regret is "
        f"{regret['value']:.1f}{error}, {regret['value'] / max(rounds, 1):.3f} per round. "
        f"{_describe_comparator(against, regret)}"
    )


def _describe_comparator(comparator: str, regret: dict[str, Any]) -> str:
    best = describe_target(comparator)
    if regret.get("exact", is_exact(comparator)):
        return f"The comparator is exact: {best}."
    settled = "" if regret.get("settled", True) else " It has not settled: longer training may lower its loss."
    if regret.get("lower_bound"):
        bound = f"it loses at least as much as {best}, so the regret shown is a lower bound"
    else:
        bound = f"it stands for {best}; it is computed from a sample of the rounds"
    return f"The comparator is an estimate: {bound}.{settled}"


def _describe_exceptions(report: dict[str, Any]) -> list[str]:
    found, leaks = [], report.get("leaks", {"rounds": 0})
    if report["skipped"]:
        found.append(f"{report['skipped']} of {report['rounds']} rounds count for no learner.")
    for name, learner in report["learners"].items():
        if learner.get("charged_rounds"):
            who = display_name(name)
            count = f"{learner['charged_rounds']} of {learner['rounds']}"
            found.append(f"The loss of {who} was not finite in {count} rounds, and is charged at the cap there.")
    if leaks["rounds"]:
        found.append(
            f"In {leaks['rounds']} rounds the query set may have been seen before: {leaks['duplicates']} repeat the "
            f"content of an earlier round, in {leaks['overlaps']} the support and the query set share samples."
        )
    return found


def describe_regret(regret: dict[str, Any]) -> str:
    """Return an entry of ``regret`` in ``/v1/status`` as text."""
    value = f"{regret['value']:+.2f} over {regret['rounds']} rounds"
    if regret["kind"] != "baseline":
        bound = ", a lower bound" if regret["lower_bound"] else ""
        known = "exact" if regret["exact"] else f"an estimate{bound}{'' if regret['settled'] else ', not settled'}"
        error = f", standard error {regret['standard_error']:.2f}" if regret["standard_error"] else ""
        return f"{value}, as of round {regret['as_of_round']} ({known}{error})"
    if regret["interval"] is None:
        return f"{value}: {regret['verdict']}"
    low, high = regret["interval"]
    return f"{value}, 95 % interval {low:+.2f} to {high:+.2f}: {regret['verdict']}"


def format_losses(last: dict[str, Any]) -> str:
    """Return the losses of a round's record before and after adaptation as text."""
    losses = (last["loss_before"], last["loss_after"])
    return "loss " + " -> ".join("not finite" if loss is None else f"{loss:.3f}" for loss in losses)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def summary_table(report: dict[str, Any]) -> Group:
    """Return a report as a table, with one line per learner and comparator, followed by the sentences of ``verdicts``.

    Args:
        report: result of ``make_report``.
    """
    skipped = f", {report['skipped']} skipped" if report["skipped"] else ""
    table = Table(title=f"{report['rounds']} rounds of the same stream{skipped}", title_justify="left")
    table.add_column("learner")
    first, leader = next(iter(report["learners"])), find_leading(report)
    pool = next(iter(put_pool_first(report)))
    columns = (
        "mean loss, last 100",
        "mean accuracy, last 100",
        "cumulative loss",
        "rounds",
        f"regret of {leader}",
        f"{leader} is",
    )
    for column in columns:
        table.add_column(column, justify="right")
    for name, learner in put_pool_first(report).items():
        regret = report["regret"].get(name, {})
        table.add_row(
            Text(display_name(name), "bold" if name in (first, pool) else ""),
            format_mean(learner["mean_loss_last_100"], learner.get("rounds_last_100"), "{:.4f}"),
            format_mean(learner["mean_accuracy_last_100"], learner.get("accuracy_rounds_last_100"), "{:.1%}"),
            f"{learner['cumulative_loss']:.2f}",
            str(learner.get("rounds", "")),
            f"{regret['value']:+.2f}" if regret else "",
            regret.get("verdict", ""),
        )
    for name, regret in report["regret"].items():
        if regret["kind"] != "baseline":
            own_loss = report["learners"][first]["cumulative_loss"]
            known = "exact" if regret.get("exact", is_exact(name)) else "estimate"
            label = f"{display_name(name)} ({known}, as of round {regret['as_of_round']})"
            table.add_row(
                label,
                "",
                "",
                f"{own_loss - regret['value']:.2f}" if _covers_all_rounds(report, regret) else "",
                str(regret.get("rounds", "")),
                f"{regret['value']:+.2f}",
                "",
            )
    return Group(table, *(Text(sentence) for sentence in verdicts(report)))


def _covers_all_rounds(report: dict[str, Any], regret: dict[str, Any]) -> bool:
    return bool(regret["as_of_round"] == report["rounds"] and not regret.get("first_round"))


def format_mean(value: float | None, rounds: int | None, form: str) -> str:
    """Return a mean as text, with the number of rounds that it is over if they are fewer than 100."""
    if value is None:
        return ""
    return form.format(value) + (f" ({rounds} rounds)" if rounds is not None and rounds < 100 else "")
