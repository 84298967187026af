"""regret.png: the loss on new tasks, and the regret, over the rounds."""

import io
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from online_meta.regret import EXACT_COMPARATORS, MAIN_LEARNER

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
WINDOW = 20


def plot_regret(series: dict[str, Any]) -> bytes:
    """Return a PNG of the curves that ``series.regret_series`` gives."""
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
        label = f"against {kind.replace('_', ' ')} ({'exact' if kind in EXACT_COMPARATORS else 'estimate'})"
        regrets.errorbar(at, values, errors, fmt=f"{mark}-", color="black", markersize=4, capsize=2, label=label)
    _label_axes(losses, f"Loss on new tasks (mean of {WINDOW} points)", "query loss")
    _label_axes(regrets, "Regret: cumulative loss of FTML minus the other's", "regret")
    regrets.axhline(0, color="#888888", lw=0.8)
    return as_png(figure)


def as_png(figure: Figure, dpi: float | Literal["figure"] = "figure") -> bytes:
    """Return a figure as a PNG, by default with as many dots an inch as it was made for."""
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=dpi)
    return picture.getvalue()


def style_axes(axes: Axes) -> None:
    """Give axes a light grid, and no frame above and to the right."""
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def trailing_mean(values: list[float | None]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Return the mean of each value and up to WINDOW - 1 before it; unknown values are left out."""
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
