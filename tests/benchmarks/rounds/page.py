"""Compare the figures with their goals, and render the results as Markdown and as a picture."""

from collections.abc import Iterator, Mapping
from io import BytesIO
from itertools import accumulate
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as Picture

from tests.benchmarks.table import format_ratio, format_seconds

HOLDS, SHORT = "#4c9f70", "#d1603d"
COLOURS = {"ours": "#08519c", "JAX": "#e6862d"}


class Figure(NamedTuple):
    """A figure with its goal.

    Attributes:
        what: the figure.
        found: its value; None if it was not measured.
        goal: the largest value that holds, or the smallest one.
        at_least: whether the goal is the smallest value.
        spread: the interquartile range of the turns divided by their median; None for one turn.
        wrong: why the value does not count; empty if it does.
    """

    what: str
    found: float | None
    goal: float
    at_least: bool = False
    spread: float | None = None
    wrong: str = ""

    @property
    def excess(self) -> float | None:
        """By what factor the figure misses its goal; at most 1 if it holds."""
        if self.found is None or self.wrong:
            return None
        return self.goal / self.found if self.at_least else self.found / self.goal

    @property
    def verdict(self) -> str:
        """Whether the goal is met, and else by what factor it is missed."""
        if self.excess is None:
            return f"**falls short**: {self.wrong}" if self.wrong else "not measured"
        return "holds" if self.excess <= 1 else f"**falls short**: {self.excess:.2f} times the goal"


def render(result: Mapping[str, Any]) -> str:
    """Return the page with all parts that have results."""
    about, machine = result["about"], result["about"]["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    text = [
        "# A round of the system, next to plain JAX",
        "",
        f"`{about['command']}`, commit {about['commit']}, {about['wall_seconds'] / 60:.0f} minutes.",
        f"{machine['processor']}, {machine['system']}; load average {machine['load_before']:.2f} before.",
        f"{versions}.",
        *(("", "**A short run, to see that everything works: its figures mean little.**") if about["quick"] else ()),
        "",
        *NOTES,
        "",
        "| figure | found | spread | goal | verdict |",
        "|---|---|---|---|---|",
        *map(_format_figure, list_figures(result)),
        "",
        f"![Figures relative to their goals, and the first rounds of fresh processes]({about['plot']})",
    ]
    for part in result["parts"].values():
        text += ["", f"## {part['title']}", "", *part["about"]]
        if part["rows"]:
            text += ["", "| what | time | spread |", "|---|---|---|", *map(_format_row, part["rows"])]
    return "\n".join([*text, ""])


NOTES = (
    "Whole rounds: scoring, learning, the journal and the checkpoints of a run, on a history that is filled already.",
    "FTML plays alone unless the figure says otherwise, on sinusoids with the perceptron 1-40-40-1. Every process has",
    "one core and one thread. *JAX* is the same game in `tests/benchmarks/rounds/jax_ftml.py`: the same tasks, draws",
    "and first weights, a jitted score and a jitted meta-step on stacked tasks in memory. It writes nothing down. Its",
    "losses in the first rounds have to equal ours before its time counts. All that is compared takes turns. A time is",
    "the median over the turns, and a ratio the median of the ratios within a turn. *Spread* is the interquartile",
    "range divided by the median.",
)


def list_figures(result: Mapping[str, Any]) -> Iterator[Figure]:
    """Yield the figures of all parts."""
    for part in result["parts"].values():
        yield from (Figure(**figure) for figure in part["figures"])


def _format_figure(figure: Figure) -> str:
    goal = f"{'at least' if figure.at_least else 'at most'} {figure.goal:g}"
    cells = [figure.what, format_ratio(figure.found), _format_spread(figure.spread), goal, figure.verdict]
    return f"| {' | '.join(cells)} |"


def _format_row(row: Mapping[str, Any]) -> str:
    return f"| {row['what']} | {format_seconds(row['seconds'])} | {_format_spread(row['spread'])} |"


def _format_spread(spread: float | None) -> str:
    return "-" if spread is None else f"{spread:.0%}"


def draw(result: Mapping[str, Any]) -> bytes:
    """Return a PNG: each figure relative to its goal, and the time that the first rounds of fresh processes took."""
    starts = [(part, each) for part in result["parts"].values() for each in part.get("starts", {}).items()]
    picture = Picture(figsize=(14 if starts else 9, 6), layout="constrained")
    FigureCanvasAgg(picture)
    left, *others = picture.subplots(1, 2 if starts else 1, squeeze=False)[0]
    _draw_figures(left, [figure for figure in list_figures(result) if figure.excess is not None])
    for right in others:
        _draw_starts(right, starts)
    target = BytesIO()
    picture.savefig(target, format="png", dpi=110)
    return target.getvalue()


def _draw_starts(axis: Axes, starts: list[tuple[Any, tuple[str, Any]]]) -> None:
    for part, (name, start) in starts:
        style = "-" if part["game"] == "k1" else "--"
        passed = [*accumulate(start["rounds"], initial=start["wall"] - sum(start["rounds"]))]
        axis.plot(passed, style, color=COLOURS[name], label=f"{name}, {part['title']}")
    axis.set_title("Seconds since the start of the process, by rounds played")
    axis.set_yscale("log")
    axis.legend(fontsize=8)


def _draw_figures(axis: Axes, figures: list[Figure]) -> None:
    for place, figure in enumerate(figures):
        excess = figure.excess or 1.0
        axis.barh(-place, excess, color=HOLDS if excess <= 1 else SHORT)
        axis.annotate(f" {format_ratio(figure.found)}", (excess, -place), va="center", fontsize=8)
    axis.set_yticks([-place for place in range(len(figures))], [figure.what for figure in figures], fontsize=8)
    axis.axvline(1, color="black", linewidth=0.8)
    axis.set_xscale("log")
    axis.margins(x=0.15)
    axis.set_title("Figure / goal (goal / figure, where more is better)")
