"""The page and the picture of a table of beliefs."""

import io
import math
import operator
from collections.abc import Callable, Sequence
from statistics import fmean, median
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from online_meta.regret.calibration import coverage
from online_meta.types import Calibration
from tests.experiments.common.tables import COLOURS, Row, format_mean, mean_and_error


class Bar(NamedTuple):
    """What a learner has to reach.

    Attributes:
        name: of the learner in the table.
        what: the figure, in words.
        low: its least value; None for none.
        high: its largest value; None for none.
        value: the rows of one seed by name -> the figure.
        whole: whether the whole interval of 95 % has to lie between the two, and not the mean alone.
    """

    name: str
    what: str
    low: float | None
    high: float | None
    value: Callable[[dict[str, Row]], float]
    whole: bool = False


def cover(row: Row, level: float, which: str = "pit") -> float:
    """Return the coverage of a row's central intervals of a level."""
    return coverage(Calibration(tuple(row[which])), level)


def judge(rows: Sequence[Row], bars: Sequence[Bar], command: str) -> list[dict[str, Any]]:
    """Return each bar with its figure: the mean over the seeds, its interval of 95 %, and whether the bar is met."""
    by_seed: dict[int, dict[str, Row]] = {}
    for row in rows:
        by_seed.setdefault(row["asked"]["seed"], {})[row["asked"]["name"]] = row
    found = []
    for bar in bars:
        values = [value for value in (_evaluate(bar, of_seed) for of_seed in by_seed.values()) if value is not None]
        if not values:
            continue
        mean, interval = fmean(values), estimate_interval(values)
        low, high = (interval or (-math.inf, math.inf)) if bar.whole else (mean, mean)
        at_least, at_most = (operator.gt, operator.lt) if bar.whole else (operator.ge, operator.le)
        met = (bar.low is None or at_least(low, bar.low)) and (bar.high is None or at_most(high, bar.high))
        found.append(
            {
                "name": bar.name,
                "what": bar.what,
                "seeds": len(values),
                "value": mean,
                "interval": interval,
                "bar": [bar.low, bar.high],
                "whole": bar.whole,
                "met": met,
                "command": command,
            }
        )
    return found


def estimate_interval(values: Sequence[float]) -> list[float] | None:
    """Return the interval of 95 % of the mean of a normal distribution, by Student's t; None for fewer than two values.

    Few seeds estimate their spread badly: with three of them, the interval is 2.2 times as wide as that of a normal
    distribution of known spread.
    """
    from scipy.stats import t as student  # type: ignore[import-untyped]

    if len(values) < 2:
        return None
    spread = mean_and_error(values)
    mean, error = float(spread["mean"] or 0.0), float(spread["error"] or 0.0)
    half = float(student.ppf(0.975, len(values) - 1)) * error
    return [mean - half, mean + half]


def _evaluate(bar: Bar, rows: dict[str, Row]) -> float | None:
    """Return a bar's figure of one seed; None if a run that it needs is missing."""
    try:
        return bar.value(rows)
    except KeyError:
        return None


def render(result: Row, title: str, about: Sequence[str], picture: str) -> str:
    """Return the page as Markdown."""
    rows = result["rows"]
    text = [f"# {title}", "", f"`{result['command']}`, commit {result['commit']}.", "", *about, ""]
    columns = ["learner", "seeds", "nats above Bayes, median", "mean", "squared error / that of Bayes"]
    columns += ["coverage of 50 %", "of 90 %", "seconds"]
    text += [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    names = [*dict.fromkeys(row["asked"]["name"] for row in rows)]
    for name in names:
        own = [row for row in rows if row["asked"]["name"] == name]
        cells = [
            own[0]["asked"]["title"],
            str(len(own)),
            format_mean([median(row["excess"]) for row in own], ".3f"),
            format_mean([fmean(row["excess"]) for row in own], ".3f"),
            format_mean([fmean(row["mse"]) / fmean(row["bayes_mse"]) for row in own], ".2f"),
            format_mean([cover(row, 0.5) for row in own], ".3f"),
            format_mean([cover(row, 0.9) for row in own], ".3f"),
            format_mean([row["seconds"] for row in own], ".0f"),
        ]
        text.append(f"| {' | '.join(cells)} |")
    covered = " | ".join(f"{cover(rows[0], level, 'bayes_pit'):.3f}" for level in (0.5, 0.9))
    text += [
        f"| *exact Bayes* | | 0 | 0 | 1 | {covered} | |",
        "",
        "Means over the seeds ± standard error. Seconds are CPU seconds of a run, on one thread.",
        "",
    ]
    text += list_figures(result["figures"])
    return "\n".join([*text, f"![Answers to three tasks, and nats above Bayes while learning]({picture})", ""])


def list_figures(figures: Sequence[dict[str, Any]]) -> list[str]:
    """Return the lines of a table of figures and their goals; none if there are no figures."""
    if not figures:
        return []
    head = ["| learner | figure | found | 95 % interval | goal | verdict |", "|---|---|---|---|---|---|"]
    return [*head, *(f"| {' | '.join(_bar_cells(figure))} |" for figure in figures), ""]


def _bar_cells(figure: dict[str, Any]) -> list[str]:
    low, high = figure["bar"]
    goal = (
        f"{low} to {high}"
        if low is not None and high is not None
        else f"at least {low}"
        if high is None
        else f"at most {high}"
    )
    goal = f"interval {goal}" if figure.get("whole") else goal
    interval = figure["interval"]
    known = "" if interval is None else f"{interval[0]:.3f} to {interval[1]:.3f}"
    verdict = "holds" if figure["met"] else "**falls short**"
    return [figure["name"], figure["what"], f"{figure['value']:.3f}", known, goal, verdict]


def draw(rows: Sequence[Row]) -> bytes:
    """Return the picture as PNG: intervals of 90 % next to the exact ones for each learner, and the learning curves."""
    first = [row for row in rows if row["asked"]["seed"] == rows[0]["asked"]["seed"]]
    tasks = len(first[0]["drawn"])
    figure = Figure(figsize=(4 * tasks, 2.4 * len(first) + 4), layout="constrained")
    grid = figure.add_gridspec(len(first) + 1, tasks, height_ratios=[*[1] * len(first), 1.6])
    for place, row in enumerate(first):
        for column, one in enumerate(row["drawn"]):
            _draw_task(figure.add_subplot(grid[place, column]), one, row["asked"]["title"] if column == 0 else "")
    curves = figure.add_subplot(grid[-1, :])
    for place, row in enumerate(first):
        colour, dash = COLOURS[place % len(COLOURS)], ("-", "--", ":")[place // len(COLOURS) % 3]
        curves.plot(*zip(*row["curve"], strict=True), dash, color=colour, label=row["asked"]["title"])
    curves.set(xlabel="meta-steps", ylabel="nats above Bayes")
    figure.suptitle("Blue: the answer and its interval of 90 %. Grey: the exact one. Dots: what is known.", fontsize=9)
    curves.legend(ncols=3, fontsize=8)
    written = io.BytesIO()
    figure.savefig(written, format="png", dpi=80)
    return written.getvalue()


def _draw_task(axes: Axes, drawn: dict[str, Any], title: str) -> None:
    for name, colour, alpha in (("exact", "#999999", 0.35), ("own", COLOURS[0], 0.3)):
        low, middle, high = drawn[name]
        axes.fill_between(drawn["grid"], low, high, color=colour, alpha=alpha, linewidth=0)
        axes.plot(drawn["grid"], middle, color=colour, linewidth=1)
    axes.plot(drawn["support"]["x"], drawn["support"]["y"], "k.", markersize=5)
    spread = drawn["exact"][0] + drawn["exact"][2]
    margin = 0.2 * (max(spread) - min(spread))
    axes.set_ylim(min(spread) - margin, max(spread) + margin)
    axes.set_title(title, fontsize=9, loc="left")
    axes.tick_params(labelsize=7)
