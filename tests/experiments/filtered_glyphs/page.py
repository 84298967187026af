"""The page and the picture of filtered glyphs."""

from collections.abc import Callable, Sequence
from functools import partial
from statistics import fmean
from typing import Any

import numpy as np
from deploy.reports.report import as_png, style_axes
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from tests.experiments.beliefs.page import Bar, estimate_interval, judge, list_figures
from tests.experiments.common.tables import COLOURS, Row, format_mean, read_command, read_commit
from tests.experiments.filtered_glyphs.filters import FILTERS
from tests.experiments.filtered_glyphs.runs import BATCH, CONTESTANTS, HIDDEN, INNER_STEPS, MIXTURE, MOST, SINGLE, STEPS
from tests.experiments.filtered_glyphs.streams import PHASES, QUERIES, SHOTS, SIZE, STREAMS, WAYS, list_parts

NAME = "filtered_glyphs"
MAIN, OTHER = "dp_mixture", "ftml"
"""The learners that are compared."""
LARGER = "ftml_large_steps"
"""One initialisation with larger inner steps, with which the mixture is compared as well."""
WINDOW = 15
"""Rounds that a point of the curves in the picture is the mean of."""
LINES = dict(zip(CONTESTANTS, (COLOURS[0], COLOURS[1], "#888888", "#000000"), strict=False))
SHADES = dict(zip(FILTERS, COLOURS[2:], strict=True))
"""Colours of learners and of filters; what has none is not drawn."""


def _gain(rows: dict[str, Row], parts: Sequence[str] = (), other: str = OTHER) -> float:
    """Return how much more accurate the mixture is after adaptation, over all rounds or in ``parts``."""
    ours, theirs = rows[MAIN], rows[other]
    if not parts:
        return float(ours["after"] - theirs["after"])
    return fmean(ours["parts"][part]["after"] - theirs["parts"][part]["after"] for part in parts)


def _list_bars(stream: str) -> list[Bar]:
    """Return what the mixture has to reach on a stream: to be ahead of one initialisation, beyond chance."""
    ahead = f"{stream}: accuracy above that of {SINGLE.title}"
    values: dict[str, Callable[[dict[str, Row]], float]] = {ahead: _gain}
    larger = f"{stream}: accuracy above that of {CONTESTANTS[LARGER].title}"
    values[larger] = partial(_gain, other=LARGER)
    if stream == PHASES:
        values[f"{ahead}, on return to old filters"] = partial(_gain, parts=list_parts(stream)[len(FILTERS) :])
    return [Bar(MAIN, what, 0.0, None, value, whole=True) for what, value in values.items()]


def compose(rows: Sequence[Row]) -> dict[str, Any]:
    """Return the result of finished rows: the rows without what is drawn, and the figures with their bars."""
    command = read_command(f"tests.experiments.{NAME}")
    kept = [{key: value for key, value in row.items() if key != "drawn"} for row in rows]
    figures = [
        {"stream": stream, **figure}
        for stream in STREAMS
        for figure in judge(_of_stream(kept, stream), _list_bars(stream), command)
    ]
    return {"command": command, "commit": read_commit(), "rows": kept, "figures": figures}


def _of_stream(rows: Sequence[Row], stream: str, name: str | None = None) -> list[Row]:
    """Return the rows of a stream, those of one learner if it is named."""
    return [row for row in rows if row["asked"]["stream"] == stream and name in (None, row["asked"]["name"])]


def render(result: Row) -> str:
    """Return the page as Markdown."""
    rows = result["rows"]
    text = f"""# Filtered glyphs: a mixture of initialisations against one

`{result["command"]}`, commit {result["commit"]}.

The non-homogeneous stream of Jerfel et al. (NeurIPS 2019), rebuilt on letters of Debian's fonts-noto-core in place of
miniImageNet. Tasks are {WAYS}-way and {SHOTS}-shot, with {QUERIES} queries of each letter; {SIZE} x {SIZE} pixels.
All images of a task go through one filter: *plain*, *blur*, *night* (a quarter of the brightness) or *pencil* (an edge
drawing on white paper). Only the learner in the row that says so knows the filter. In *phases*, the filters follow
one another, and then come back in the same order. In *mixed*, the filter of each round is drawn at random. The rounds
are {rows[0]["asked"]["rounds"]}, and each task is scored before it is learned; both streams have the same letters.

The network is a perceptron with layers of {" and ".join(map(str, HIDDEN))} units on raw pixels. Every learner adapts by
{INNER_STEPS} steps of gradient descent of size {SINGLE.inner_lr:g}, and makes {STEPS} meta-steps of Adam
({SINGLE.meta_lr:g}) on {BATCH} past tasks after each round. The Dirichlet-process mixture (concentration
{MIXTURE.options["concentration"]:g}, temperature {MIXTURE.options["temperature"]:g}, at most {MOST} components) makes
as many with each component, each on the tasks that it is responsible for; *{MOST * STEPS} meta-steps* gives one
initialisation as many in all. Concentration and temperature are the better of two pairs on seed 100; the inner steps
were not tuned. `python -m tests.experiments.filtered_glyphs.tuning` tries more settings on that seed.

"""
    for stream in STREAMS:
        if own := _of_stream(rows, stream):
            text += "\n".join([*_list_learners(stream, own), *_list_parts(stream, own), ""])
    about = "A figure is the mean of the differences of paired runs, with the same tasks and initial weights."
    return text + "\n".join(
        ["## Goals", "", about, "", *list_figures(result["figures"]), f"![{CAPTION}]({NAME}.png)", ""]
    )


CAPTION = "A glyph under each filter, accuracy by round, and components by round"


def _list_learners(stream: str, rows: Sequence[Row]) -> list[str]:
    """Return a table of the learners on a stream."""
    columns = ["learner", "seeds", "accuracy before", "after", "nats", "calibration error"]
    columns += ["components", "Rand index", "in the last half", "seconds"]
    text = [f"## {stream.capitalize()}", "", f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    for name in CONTESTANTS:
        own = [row for row in rows if row["asked"]["name"] == name]
        if not own:
            continue
        figures = {"before": ".3f", "after": ".3f", "nll": ".3f", "ece": ".3f"}
        figures |= {"clusters": ".1f", "rand": ".2f", "rand_of_last_half": ".2f", "seconds": ".0f"}
        cells = [
            format_mean([row[key] for row in own if row[key] is not None], form, "") for key, form in figures.items()
        ]
        text.append(f"| {' | '.join([own[0]['asked']['title'], str(len(own)), *cells])} |")
    return [
        *text,
        "",
        "Means over the seeds ± standard error. *Nats* are the mean negative log-likelihood after adaptation. The Rand",
        "index, adjusted for chance, compares the component that a task is given to with its filter. *Seconds* are CPU",
        "seconds of a run.",
        "",
    ]


def _list_parts(stream: str, rows: Sequence[Row]) -> list[str]:
    """Return a table of the parts of a stream: accuracies of the learners, and paired differences with intervals."""
    names = [name for name in CONTESTANTS if any(row["asked"]["name"] == name for row in rows)]
    titles = [CONTESTANTS[name].title for name in names]
    columns = ["accuracy after, by part", *titles, f"{MIXTURE.title} - {SINGLE.title}, 95 %", "calibration error, 95 %"]
    text = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    by_seed: dict[int, dict[str, Row]] = {}
    for row in rows:
        by_seed.setdefault(row["asked"]["seed"], {})[row["asked"]["name"]] = row
    for part in (*list_parts(stream), None):
        found = {seed: {name: _of_part(row, part) for name, row in own.items()} for seed, own in by_seed.items()}
        cells = [format_mean([own[name]["after"] for own in found.values() if own.get(name)], ".3f") for name in names]
        for key in ("after", "ece"):
            pairs = [(own.get(MAIN), own.get(OTHER)) for own in found.values()]
            cells.append(_format_interval([ours[key] - theirs[key] for ours, theirs in pairs if ours and theirs]))
        text.append(f"| {' | '.join([part or '*all*', *cells])} |")
    return [*text, ""]


def _of_part(row: Row, part: str | None) -> Row:
    """Return a row's figures of a part, which are empty if it has no round; for None, those of all rounds."""
    found: Row = row if part is None else row["parts"].get(part, {})
    return found


def _format_interval(values: Sequence[float]) -> str:
    if not values:
        return ""
    interval = estimate_interval(values)
    return f"{fmean(values):+.3f}" + ("" if interval is None else f" ({interval[0]:+.3f} to {interval[1]:+.3f})")


def draw(rows: Sequence[Row]) -> bytes:
    """Return the picture as PNG."""
    figure = Figure(figsize=(13, 9), dpi=90, layout="constrained")
    grid = figure.add_gridspec(3, 2 * len(FILTERS), height_ratios=[1, 2.2, 1.3])
    glyphs: dict[str, list[list[float]]] = next((row["drawn"]["glyphs"] for row in rows if row["drawn"]["glyphs"]), {})
    for place, (name, image) in enumerate(glyphs.items()):
        axes = figure.add_subplot(grid[0, 2 * place : 2 * place + 2])
        axes.imshow(image, cmap="gray", vmin=0, vmax=1)
        axes.set_title(name, fontsize=10, color=SHADES[name])
        axes.set_axis_off()
    streams = [stream for stream in STREAMS if _of_stream(rows, stream)]
    width = 2 * len(FILTERS) // len(streams)
    for place, stream in enumerate(streams):
        columns = slice(place * width, (place + 1) * width)
        own = _of_stream(rows, stream)
        _draw_curves(figure.add_subplot(grid[1, columns]), stream, own)
        _draw_components(figure.add_subplot(grid[2, columns]), _of_stream(own, stream, MAIN)[:1])
    return as_png(figure)


def _draw_curves(axes: Axes, stream: str, rows: Sequence[Row]) -> None:
    """Draw the accuracy by round: means over the seeds, with bands of two standard errors for the compared learners."""
    for name, colour in LINES.items():
        curves = np.array([_smooth(row["drawn"]["after"]) for row in rows if row["asked"]["name"] == name])
        if not curves.size:
            continue
        mean, rounds = curves.mean(0), np.arange(curves.shape[1]) + WINDOW / 2
        axes.plot(
            rounds, mean, color=colour, label=CONTESTANTS[name].title, linewidth=1.8 if name in (MAIN, OTHER) else 1
        )
        if name in (MAIN, OTHER) and len(curves) > 1:
            error = 2 * curves.std(0, ddof=1) / len(curves) ** 0.5
            axes.fill_between(rounds, mean - error, mean + error, color=colour, alpha=0.2, linewidth=0)
    if stream == PHASES and rows:
        filters = rows[0]["drawn"]["filters"]
        for t, name in enumerate(filters):
            axes.axvspan(t, t + 1, color=SHADES[name], alpha=0.12, linewidth=0)
    axes.set(title=stream, xlabel="round", ylabel=f"accuracy after adaptation, mean of {WINDOW} rounds")
    style_axes(axes)
    axes.legend(frameon=False, fontsize=8, loc="lower right")


def _smooth(values: Sequence[float]) -> NDArray[np.float64]:
    window = min(WINDOW, len(values))
    return np.convolve(values, np.full(window, 1 / window), mode="valid")


def _draw_components(axes: Axes, rows: Sequence[Row]) -> None:
    """Draw the component that each task of a run is given to, in the colour of its filter."""
    for row in rows:
        drawn = row["drawn"]
        for name, colour in SHADES.items():
            own = [t for t, other in enumerate(drawn["filters"]) if other == name]
            places = [drawn["components"][t] + 0.12 * (list(SHADES).index(name) - 1.5) for t in own]
            axes.plot(own, places, "|", color=colour, label=name, markersize=9)
        axes.set_title(f"seed {row['asked']['seed']}", fontsize=9)
    axes.set(xlabel="round", ylabel="component", yticks=range(MOST), ylim=(-0.5, MOST - 0.5))
    style_axes(axes)
