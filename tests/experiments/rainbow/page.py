"""Render the page of rainbow digits by the protocol of Follow the Meta-Leader."""

from collections.abc import Sequence
from statistics import mean
from typing import NamedTuple

import numpy as np
from deploy.reports.report import as_png, style_axes
from online_meta.regret.ledger import MAIN_LEARNER
from tests.experiments.common.playing import TUNED
from tests.experiments.common.tables import COLOURS, Row, format_mean
from tests.experiments.rainbow.runs import DRAWS, HIDDEN, LABELS, OPTIONS, PREFIXES, STEPS, TEST, TRAIN, WARM_UP

NAME = "rainbow_protocol"
PROFICIENCY, FEWER = 0.9, 0.8
"""The accuracies of the table: that of the paper, and a lower one."""


class Efficiency(NamedTuple):
    """Means over the tasks of a run: final ``accuracy``, share that ``reached`` the proficiency, ``points`` needed."""

    accuracy: float
    reached: float
    points: float


def compute_efficiency(row: Row, proficiency: float) -> Efficiency:
    """Return the efficiency of a run; a task on which the proficiency is not reached counts with all its points."""
    needed = [next((points for points, right in curve if right >= proficiency), None) for curve in row["curves"]]
    points = [curve[-1][0] if found is None else found for found, curve in zip(needed, row["curves"], strict=True)]
    final = [curve[-1][1] for curve in row["curves"]]
    return Efficiency(mean(final), mean(found is not None for found in needed), mean(points))


def render(result: Row) -> str:
    """Return the table as Markdown: means over the seeds and their standard errors."""
    minutes = sum(row["seconds"] for row in result["rows"]) / 60
    accuracies = [f"accuracy on all {10 * TRAIN}", "first half", "last half"]
    needed = [word for share in (PROFICIENCY, FEWER) for word in (f"points to {share:.0%}", "reached")]
    head = f"| {' | '.join(['learner', 'seeds', *accuracies, *needed, 'seconds'])} |"
    text = f"""# Rainbow digits by the protocol of Follow the Meta-Leader

`{result["command"]}`, commit {result["commit"]}; {minutes:.0f} minutes of one core in all.

The protocol of Finn et al. (ICML 2019, section 5.1), scaled down: {result["iterations"]} tasks with 10 classes, each
with {10 * TRAIN} training images in random order and {10 * TEST} test images. The first {WARM_UP} tasks are learned but
not scored. Inner loop: 5 steps of gradient descent with step size 0.1. Outer loop: {STEPS} steps after each task, of
Adam with learning rate 1e-3, on 25 past tasks per step. *Train on everything* and *FTL* make six times as many steps,
which is the same number of gradients; MOML makes {OPTIONS["moml"]["steps"]} on the new task alone. A meta-gradient uses
{DRAWS[0]} support and {DRAWS[1]} query images, drawn anew from the {10 * TRAIN} of a task. *From scratch* makes
{OPTIONS["from_scratch"]["steps"]} steps of Adam with learning rate {OPTIONS["from_scratch"]["lr"]:g}. *{TUNED}* is
FTML's leader, adapted with these steps instead of its own five: the value of the initialisation when both adapt in the
same way. Three things differ from the paper. A round is a whole task, where the paper learns while the images arrive.
The network is a perceptron with two layers of {HIDDEN[0]} on centred images, not a convolutional one. There are only
5,000 digits, so images return in other colours, sizes and rotations.

*Points needed* is the smallest of {", ".join(map(str, PREFIXES))} and {10 * TRAIN} images with which an adapted learner
reaches the accuracy in the heading; {10 * TRAIN} if none does. *Reached* is the share of tasks that reach it. Mean over
the tasks after the warm-up, then over the seeds, ± standard error over the seeds. Seconds are CPU seconds per run.

{head}
|---|---|---|---|---|---|---|---|---|---|
"""
    for label, mine in group_by_label(result["rows"]).items():
        text += f"| {label} | {len(mine)} | {' | '.join(_format_cells(mine))} |\n"
    return text + f"\n![Accuracy by points, and by task]({NAME}.png)\n"


def group_by_label(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Group the rows by learner; ``TUNED`` follows FTML, with the curves from FTML's runs."""
    tuned = [{"asked": row["asked"] | {"label": TUNED}, "curves": row["tuned"]} for row in rows if row.get("tuned")]
    labels = [name for label in LABELS for name in ((label, TUNED) if LABELS[label] == MAIN_LEARNER else (label,))]
    found = {label: [row for row in (*rows, *tuned) if row["asked"]["label"] == label] for label in labels}
    return {label: mine for label, mine in found.items() if mine}


def _format_cells(rows: list[Row]) -> list[str]:
    high, low = ([compute_efficiency(row, proficiency) for row in rows] for proficiency in (PROFICIENCY, FEWER))
    halves = zip(*(_mean_halves([curve[-1][1] for curve in row["curves"]]) for row in rows), strict=True)
    columns: list[tuple[Sequence[float], str]] = [
        ([found.accuracy for found in high], ".1%"),
        *((half, ".1%") for half in halves),
        ([found.points for found in high], ".0f"),
        ([found.reached for found in high], ".0%"),
        ([found.points for found in low], ".0f"),
        ([found.reached for found in low], ".0%"),
        ([row["seconds"] for row in rows if "seconds" in row], ".0f"),
    ]
    return [format_mean(values, form) for values, form in columns]


def _mean_halves(values: list[float]) -> tuple[float, float]:
    middle = max(len(values) // 2, 1)
    return mean(values[:middle]), mean(values[-middle:])


def plot(rows: Sequence[Row]) -> bytes:
    """Return a PNG: the mean accuracy by number of points, and the accuracy with all points by task."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.5), dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2)
    for (label, mine), colour in zip(group_by_label(rows).items(), (*COLOURS, "#000000"), strict=False):
        curves = np.array([row["curves"] for row in mine])
        left.plot(curves[0, 0, :, 0], curves[..., 1].mean((0, 1)), marker="o", color=colour, label=label)
        right.plot(WARM_UP + np.arange(curves.shape[1]), curves[:, :, -1, 1].mean(0), color=colour, label=label)
    left.set(xscale="log", xlabel="images adapted to", ylabel="accuracy", title="Mean of the tasks")
    right.set(xlabel="task", title=f"On all {10 * TRAIN} images")
    for axes in (left, right):
        axes.axhline(PROFICIENCY, color="grey", linewidth=0.8, linestyle="--")
        style_axes(axes)
    left.legend(frameon=False, fontsize=9)
    return as_png(figure)
