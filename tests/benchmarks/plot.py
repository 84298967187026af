"""Plot the results."""

from collections.abc import Mapping
from io import BytesIO
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from tests.benchmarks.goals import compute_ratio

COLOURS = {
    "ours, compiled": "#08519c",
    "ours, traced": "#3182bd",
    "ours, vmap": "#6baed6",
    "ours, loop": "#2171b5",
    "ours, rematerialised": "#9ecae1",
    "ours, 25 queries at a time": "#9ecae1",
    "higher": "#a1a1a1",
    "torchopt": "#c7c7c7",
    "JAX": "#e6862d",
}


def draw(result: Mapping[str, Any]) -> bytes:
    """Return a PNG: time and memory relative to the unrolled loop with the goals, and memory by number of steps."""
    grown = "growth" in result
    figure = Figure(figsize=(18 if grown else 12, 9), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 3 if grown else 2, squeeze=False)[0]
    for axis, (measure, title) in zip(axes, (("seconds", "Time"), ("bytes", "Peak memory")), strict=False):
        _plot_bars(axis, result["works"], measure, first=measure == "seconds")
        axis.set_title(f"{title} / unrolled loop (mark: goal)")
    if grown:
        _plot_growth(axes[2], result["growth"])
    target = BytesIO()
    figure.savefig(target, format="png", dpi=110)
    return target.getvalue()


def _plot_bars(axis: Axes, works: Mapping[str, Any], measure: str, first: bool) -> None:
    place, ticks, labels = 0.0, [], []
    for name, work in works.items():
        rows = {row["contestant"]: row for row in work["rows"]}
        shares = {who: compute_ratio(rows, who, measure, "unrolled") for who in rows if who != "unrolled"}
        goals = {
            g["contestant"]: g["most"] for g in work["goals"] if (g["measure"], g["peer"]) == (measure, "unrolled")
        }
        for who, value in shares.items():
            if value is not None:
                axis.barh(place, value, color=COLOURS[who])
                axis.annotate(f" {value:.3g}", (value, place), va="center", fontsize=8)
            if who in goals:
                axis.plot([goals[who]] * 2, [place - 0.45, place + 0.45], color="black", linewidth=2)
            ticks.append(place)
            labels.append(f"{name}   {who}")
            place -= 1
        place -= 0.8
    axis.axvline(1, color="grey", linewidth=0.8, linestyle=":")
    axis.set_xscale("log")
    axis.set_yticks(ticks, labels if first else [""] * len(ticks), fontsize=8)
    axis.margins(x=0.12, y=0.01)


def _plot_growth(axis: Axes, growth: Mapping[str, Any]) -> None:
    for name, peaks in growth["peaks"].items():
        axis.plot(growth["steps"], [peak / 1e6 for peak in peaks], marker="o", color=COLOURS[name], label=name)
    per_step = growth["parameters"] / 1e6
    start = growth["peaks"]["ours, loop"][0] / 1e6
    line = [start + per_step * (step - growth["steps"][0]) for step in growth["steps"]]
    axis.plot(growth["steps"], line, color="black", linewidth=0.8, linestyle=":", label="the parameters, once per step")
    axis.set_title("Peak memory of the transformer, MB, by inner steps")
    axis.legend()
