"""Render the page and the picture of the non-stationary streams."""

from collections.abc import Sequence
from statistics import mean
from typing import Any

import numpy as np
from deploy.reports.report import as_png, style_axes
from tests.experiments.common.tables import COLOURS, Row, format_mean
from tests.experiments.non_stationary.runs import (
    COMPARATOR,
    DYNAMIC_ROUNDS,
    DYNAMIC_STEPS,
    LABELS,
    MOST,
    STEPS,
    STREAMS,
)

NAME = "non_stationary"
Runs = dict[tuple[str, str], list[Row]]
"""Rows by stream and label."""


def group_by_run(rows: Sequence[Row]) -> Runs:
    """Group the rows by stream and label, with the seeds in order."""
    found: dict[tuple[str, str], list[Row]] = {(s, label): [] for s in STREAMS for label in (*LABELS, COMPARATOR)}
    for row in rows:
        found[row["asked"]["stream"], row["asked"]["label"]].append(row)
    return {key: sorted(some, key=lambda row: int(row["asked"]["seed"])) for key, some in found.items() if some}


def render(result: dict[str, Any]) -> str:
    """Return the table as Markdown: means over the seeds and their standard errors."""
    groups = group_by_run(result["rows"])
    keys = [key for key in groups if key[1] != COMPARATOR]
    rows = [f"| {' | '.join([*key, *_format_cells(key, groups)])} |\n" for key in keys]
    bests = [
        f"- {stream}: {_format_spread([row['total'] for row in found])}; the estimate for one seed has a standard "
        f"error of {mean(row['error'] for row in found):.2f}\n"
        for (stream, label), found in groups.items()
        if label == COMPARATOR
    ]
    return f"""# Streams that are not stationary

`{result["command"]}`, commit {result["commit"]}.

Query loss after adaptation over {result["iterations"]} rounds; each task is scored before it is learned. Mean over the
seeds ± standard error. FTML makes {STEPS} meta-steps per round on 5 tasks, with each replay policy. The
Dirichlet-process mixture (uniform replay) makes {STEPS} meta-steps per component, and the new round is in every
meta-batch. Two controls separate these effects: the code of the mixture with one component for all tasks, and
{STEPS * MOST} steps per round, the maximum that its {MOST} components make together. *Against uniform* is the
difference in cumulative loss, seed by seed; below 0 is better. *Dynamic regret* is the cumulative loss minus that of
{COMPARATOR}, which has seen its query set. That optimum is found by at most {DYNAMIC_STEPS} steps of L-BFGS from the
final weights of FTML with uniform replay, on {DYNAMIC_ROUNDS} evenly spaced rounds, so the regret is a lower bound.
*Seconds* are those of scoring and learning.

| stream | learner | seeds | cumulative loss | against uniform | dynamic regret | last half | components | seconds |
|---|---|---|---|---|---|---|---|---|
{"".join(rows)}
Cumulative loss of {COMPARATOR}:

{"".join(bests)}
![Cumulative loss by round]({NAME}.png)
"""


def _format_cells(key: tuple[str, str], groups: Runs) -> list[str]:
    rows, (stream, label) = groups[key], key
    totals = {row["asked"]["seed"]: sum(row["losses"]) for row in rows}
    even = {row["asked"]["seed"]: sum(row["losses"]) for row in groups.get((stream, "uniform"), [])}
    best = {row["asked"]["seed"]: row["total"] for row in groups.get((stream, COMPARATOR), [])}
    above = [[total - other[seed] for seed, total in totals.items() if seed in other] for other in (even, best)]
    return [
        str(len(rows)),
        _format_spread([*totals.values()]),
        _format_spread(above[0]) if label != "uniform" else "",
        _format_spread(above[1]),
        _format_spread([mean(row["losses"][len(row["losses"]) // 2 :]) for row in rows]),
        _format_spread([row["components"][-1] for row in rows if row["components"][-1]]),
        _format_spread([row["seconds"] for row in rows]),
    ]


def _format_spread(values: Sequence[float]) -> str:
    return format_mean(values, ".2f", none="")


def plot(rows: Sequence[Row]) -> bytes:
    """Return a PNG: for each stream, the cumulative loss of each learner minus that of uniform replay."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.2), dpi=110, layout="constrained")
    groups = group_by_run(rows)
    for axes, stream in zip(figure.subplots(1, len(STREAMS)), STREAMS, strict=True):
        for label, colour in zip(LABELS, (*COLOURS, "#000000", "#888888", "#7f3c8d"), strict=True):
            if (stream, label) in groups and (stream, "uniform") in groups:
                mine, even = (
                    np.mean([np.cumsum(row["losses"]) for row in groups[stream, name]], 0)
                    for name in (label, "uniform")
                )
                axes.plot(mine - even, color=colour, label=label)
        axes.set_title(stream, fontsize=11)
        axes.set_xlabel("round")
        style_axes(axes)
    handles, names = figure.axes[0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, names, loc="outside lower center", ncols=5, frameon=False, fontsize=9)
    figure.axes[0].set_ylabel("cumulative loss minus that of uniform replay")
    return as_png(figure)
