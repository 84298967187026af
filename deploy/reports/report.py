"""Write the report of a run: report.json for programs, report.html and regret.png for people."""

import io
import json
import platform
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
from online_meta.regret.ledger import MAIN_LEARNER
from streams.atomic_files import replace_file
from trainers.comparators import describe_target, is_exact

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")


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
    rounds = np.array(series["rounds"])
    for (name, curves), colour in zip(series["learners"].items(), COLOURS * 9, strict=False):
        label = name.replace("_", " ") if name != MAIN_LEARNER else "FTML"
        losses.plot(rounds, trailing_mean(curves["loss"]), color=colour, label=label)
        if name != MAIN_LEARNER:
            regret = np.array(series["learners"][MAIN_LEARNER]["cumulative_loss"]) - np.array(curves["cumulative_loss"])
            regrets.plot(rounds, regret, color=colour, label=f"against {label}")
    losses.plot(rounds, trailing_mean(series["loss_before"]), color="#888888", ls="--", label="FTML before adaptation")
    for kind, mark in zip(dict.fromkeys(point["kind"] for point in series["comparators"]), "osD^v" * 9, strict=False):
        points = [
            (c["as_of_round"], c["regret"], c["standard_error"]) for c in series["comparators"] if c["kind"] == kind
        ]
        at, values, errors = zip(*points, strict=True)
        label = f"against {kind.replace('_', ' ')} ({'exact' if is_exact(kind) else 'estimate'})"
        regrets.errorbar(at, values, errors, fmt=f"{mark}-", color="black", markersize=4, capsize=2, label=label)
    _label_axes(losses, f"Loss on new tasks (mean of {WINDOW} points)", "query loss")
    _label_axes(regrets, "Regret: cumulative loss of FTML minus the other's", "regret")
    regrets.axhline(0, color="#888888", lw=0.8)
    return as_png(figure)


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
    known = np.array([np.nan if value is None else value for value in values], dtype=float)
    present = np.isfinite(known)
    sums = np.concatenate([[0.0], np.cumsum(np.where(present, known, 0.0))])
    counts = np.concatenate([[0], np.cumsum(present)])
    first = np.maximum(np.arange(len(known)) + 1 - WINDOW, 0)
    last = np.arange(len(known)) + 1
    return np.asarray((sums[last] - sums[first]) / np.maximum(counts[last] - counts[first], 1))


def _label_axes(axes: Axes, title: str, unit: str) -> None:
    axes.set_title(title, fontsize=11)
    axes.set_xlabel("round")
    axes.set_ylabel(unit)
    style_axes(axes)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=9)


LIBRARIES = ("online-meta", "torch", "numpy", "safetensors")


POINTS = 600


def write_report(folder: Path, view: RunView, config: Config) -> dict[str, Any]:
    """Write report.json, report.html and regret.png.

    Args:
        folder: to write to.
        view: of the run.
        config: of the run.

    Returns:
        The content of report.json.

    Raises:
        OSError: if a file cannot be written.
    """
    report = make_report(view, config)
    replace_file(folder / "report.json", json.dumps(report, indent=1, allow_nan=False).encode(), durable=False)
    picture = plot_regret(regret_series(view, 0, None, POINTS))
    replace_file(folder / "regret.png", picture, durable=False)
    pages = Environment(loader=PackageLoader("deploy", "templates"), autoescape=select_autoescape())
    page = pages.get_template("report.html").render(
        report=report, folder=folder, verdicts=verdicts(report), is_exact=is_exact
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
        "learners": view.learners(),
        "regret": view.regret(),
        "config": TypeAdapter(Config).dump_python(config, mode="json"),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in LIBRARIES}},
    }


def verdicts(report: dict[str, Any]) -> list[str]:
    """Return one sentence for each baseline and comparator that compares FTML with it.

    Args:
        report: result of ``make_report``.
    """
    sentences = []
    for against, regret in report["regret"].items():
        per_round = regret["value"] / max(regret["as_of_round"], 1)
        if regret["kind"] == "baseline":
            side = "lower" if regret["value"] < 0 else "higher"
            sentences.append(
                f"The loss of FTML is {abs(per_round):.3f} {side} per round than that of {display_name(against)}, "
                f"over {regret['as_of_round']} rounds."
            )
        else:
            error = f" (standard error {regret['standard_error']:.1f})" if regret["standard_error"] else ""
            sentences.append(
                f"Against the {display_name(against)} comparator, as of round {regret['as_of_round']}, the regret is "
                f"{regret['value']:.1f}{error}, {per_round:.3f} per round. {_describe_comparator(against)}"
            )
    return sentences


def _describe_comparator(comparator: str) -> str:
    if is_exact(comparator):
        return f"The comparator is exact: {describe_target(comparator)}, by algebra."
    best = describe_target(comparator)
    return f"The comparator is an estimate: it loses at least as much as {best}, so the regret shown is a lower bound."


def display_name(name: str) -> str:
    """Return the name of a learner or comparator with spaces in place of underscores."""
    return name.replace("_", " ")


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
    table = Table(title=f"{report['rounds']} rounds of the same stream", title_justify="left")
    table.add_column("learner")
    for column in ("mean loss, last 100", "mean accuracy, last 100", "cumulative loss", "regret of FTML"):
        table.add_column(column, justify="right")
    for name, learner in report["learners"].items():
        regret = report["regret"].get(name)
        table.add_row(
            "[bold]FTML[/]" if name == MAIN_LEARNER else display_name(name),
            _format_figure(learner["mean_loss_last_100"], "{:.4f}"),
            _format_figure(learner["mean_accuracy_last_100"], "{:.1%}"),
            f"{learner['cumulative_loss']:.2f}",
            f"{regret['value']:+.2f}" if regret else "",
        )
    for name, regret in report["regret"].items():
        if regret["kind"] != "baseline":
            ftml_loss = report["learners"][MAIN_LEARNER]["cumulative_loss"]
            known = "exact" if is_exact(name) else "estimate"
            label = f"{display_name(name)} ({known}, as of round {regret['as_of_round']})"
            table.add_row(
                label,
                "",
                "",
                f"{ftml_loss - regret['value']:.2f}" if _covers_all_rounds(report, regret) else "",
                f"{regret['value']:+.2f}",
            )
    return Group(table, *(Text(sentence) for sentence in verdicts(report)))


def _covers_all_rounds(report: dict[str, Any], regret: dict[str, Any]) -> bool:
    return bool(regret["as_of_round"] == report["rounds"])


def _format_figure(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)
