"""Render the page of rainbow digits by the protocol of Follow the Meta-Leader."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean
from typing import NamedTuple

import numpy as np
from deploy.reports.report import as_png, style_axes
from online_meta.regret.ledger import MAIN_LEARNER
from tests.experiments.common.playing import TUNED
from tests.experiments.common.tables import COLOURS, Row, format_mean
from tests.experiments.rainbow.runs import DRAWS, HIDDEN, LABELS, OPTIONS, PREFIXES, STEPS, TEST, TRAIN, WARM_UP
from trainers.learner_settings import POOL

NAME = "rainbow_protocol"
PROFICIENCY, FEWER = 0.9, 0.8
"""The accuracies of the table: that of the paper, and a lower one."""
BY_SIZE = "pool, weights by size"
"""The label of the pools that have weights of their own for each size of the support set."""
BY_PRODUCTS = {MAIN_LEARNER: (TUNED, "tuned"), POOL: (BY_SIZE, "by_size")}
"""Further rows from the runs of a learner: the label, and where a run has the curves."""
SAVING, REACHED = 0.8, 0.85
"""The goals of the pool: its points to ``FEWER`` as a share of FTML's, at most; the share of tasks, at least."""
EXPERTS = 8
"""Experts that the page lists, those that need the fewest points."""


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

`{result["command"]}`, {_name_commits(result)}; {minutes:.0f} minutes of one core in all.

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
    return text + "\n".join(["", *_render_pool(result["rows"]), f"![Accuracy by points, and by task]({NAME}.png)", ""])


def _name_commits(result: Row) -> str:
    """Return which commits made the rows: one, or each with its learners."""
    made: dict[str, list[str]] = {}
    for row in result["rows"]:
        labels = made.setdefault(row.get("commit", result["commit"]), [])
        labels += [row["asked"]["label"]] if row["asked"]["label"] not in labels else []
    if len(made) < 2:
        return f"commit {next(iter(made), result['commit'])}"
    return "; ".join(f"commit {commit} made the rows of {', '.join(labels)}" for commit, labels in made.items())


def _render_pool(rows: Sequence[Row]) -> Iterator[str]:
    """Yield the lines on the pool, if it has played: its goals, its experts and their weights."""
    groups = group_by_label(rows)
    pools = {label: groups[label] for label in (POOL, BY_SIZE) if label in groups}
    if not pools:
        return
    runs = groups[POOL]
    experts = f"Its {len(runs[0]['experts'])} experts are"
    yield f"""## The pool

The pool is that of a run's defaults: Bayes' rule over the predicted probabilities, with weights from the losses on the
test images of all tasks before, those of the warm-up included. {experts} answers of
FTML's leader, of *from scratch*, and of a good embedding: a classifier of the ten digits of all tasks, of which each
task gets a new head. The leader answers after several numbers of inner steps (`ftml@10`), after the steps of *from
scratch* (`ftml@adam40`), after as many with a smaller step size (`ftml@slow_adam40`), and with a ridge regression of
its features as the head. *pool* has one vector of weights, from the losses with all {10 * TRAIN} images. *{BY_SIZE}*
is a pool for each number of images, with weights from the losses with this number. What plays was chosen on 16 tasks of
seed 100, which is not in the table. *Train on everything* and *FTL* were left out: they cost
a lot and added little there.
"""
    yield from _render_goals(pools, groups)
    yield from _render_experts(runs)


def _render_goals(pools: dict[str, list[Row]], groups: dict[str, list[Row]]) -> Iterator[str]:
    """Yield a table of the goals; that on FTML's points needs its rows."""
    ftml = next((groups[label] for label, name in LABELS.items() if name == MAIN_LEARNER and label in groups), [])
    yield from ("| | goal | measured | |", "|---|---|---|---|")
    for label, mine in pools.items():
        if ftml:
            needed = [compute_efficiency(row, FEWER).points for row in mine]
            most = SAVING * mean(compute_efficiency(row, FEWER).points for row in ftml)
            goal = f"points to {FEWER:.0%}: at most {SAVING} of FTML's, {most:.0f}"
            yield f"| {label} | {goal} | {format_mean(needed, '.0f')} | {_judge(mean(needed) <= most)} |"
        reached = [compute_efficiency(row, PROFICIENCY).reached for row in mine]
        goal = f"{PROFICIENCY:.0%} reached: on at least {REACHED:.0%} of the tasks"
        yield f"| {label} | {goal} | {format_mean(reached, '.1%')} | {_judge(mean(reached) >= REACHED)} |"
    yield ""


def _judge(holds: bool) -> str:
    return "holds" if holds else "**falls short**"


def _render_experts(runs: list[Row]) -> Iterator[str]:
    """Yield a table of the experts that need the fewest points, with the weights after the last round."""
    names = [*runs[0]["experts"]]
    points = {name: [run["experts"][name]["points"] for run in runs] for name in names}
    sizes = [*runs[0]["weights"]]
    weights = {name: [mean(run["weights"][size].get(name, 0.0) for run in runs) for size in sizes] for name in names}
    best = sorted(names, key=lambda name: mean(few for _, few in points[name]))[:EXPERTS]
    shown = [*best, *(name for name in names if name not in best and max(weights[name]) >= 0.1)]
    yield f"The experts that need the fewest points to {FEWER:.0%}, and those with a weight of 0.1 or more. The weights"
    yield f"are those after the last task with {', '.join(sizes)} images; those of *pool* are the last of these."
    yield ""
    yield f"| expert | points to {PROFICIENCY:.0%} | reached | points to {FEWER:.0%} | weights by size |"
    yield "|---|---|---|---|---|"
    for name in shown:
        high, low = zip(*points[name], strict=True)
        reached = [run["experts"][name]["reached"][0] for run in runs]
        cells = [format_mean(high, ".0f"), format_mean(reached, ".0%"), format_mean(low, ".0f")]
        yield f"| {' | '.join([name, *cells, ', '.join(f'{one:.2f}' for one in weights[name])])} |"
    yield ""


def group_by_label(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Group the rows by learner; ``BY_PRODUCTS`` follow the learner whose runs they come from."""
    found: dict[str, list[Row]] = {}
    for label, name in LABELS.items():
        found[label] = [row for row in rows if row["asked"]["label"] == label]
        if name in BY_PRODUCTS:
            other, part = BY_PRODUCTS[name]
            found[other] = [
                {"asked": row["asked"] | {"label": other}, "curves": row[part]} for row in found[label] if row.get(part)
            ]
    return {label: mine for label, mine in found.items() if mine}


def read_other_rows(file: Path, rounds: int, labels: Sequence[str]) -> list[Row]:
    """Return the rows of a written table with this number of tasks, but for those of ``labels``."""
    rows: list[Row] = json.loads(file.read_text(encoding="utf-8"))["rows"]
    return [row for row in rows if row["asked"]["rounds"] == rounds and row["asked"]["label"] not in labels]


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
    colours = dict(zip(LABELS, (*COLOURS, "#000000"), strict=True))
    dashed = {other: label for label, name in LABELS.items() for other, _ in [BY_PRODUCTS.get(name, ("", ""))]}
    for label, mine in group_by_label(rows).items():
        style: Row = {"color": colours[dashed.get(label, label)], "ls": "--" if label in dashed else "-"}
        curves = np.array([row["curves"] for row in mine])
        left.plot(curves[0, 0, :, 0], curves[..., 1].mean((0, 1)), marker="o", label=label, **style)
        right.plot(WARM_UP + np.arange(curves.shape[1]), curves[:, :, -1, 1].mean(0), **style)
    left.set(xscale="log", xlabel="images adapted to", ylabel="accuracy", title="Mean of the tasks")
    right.set(xlabel="task", title=f"On all {10 * TRAIN} images")
    for axes in (left, right):
        axes.axhline(PROFICIENCY, color="grey", linewidth=0.8, linestyle="--")
        style_axes(axes)
    left.legend(frameon=False, fontsize=9)
    return as_png(figure)
