"""Render the page and the picture of the cost of a round."""

from statistics import median, quantiles
from typing import Any, NamedTuple

from deploy.reports.report import as_png
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from tests.experiments.common.tables import Row, format_spread
from tests.experiments.round_cost.loss import compare
from tests.experiments.round_cost.runs import UNBOUNDED

MAX_RATIO, MAX_EXCESS = 1.10, 0.02
"""Limits: the ratio between any two costs, and the relative excess loss of the best bounded policy over full replay."""


class Growth(NamedTuple):
    """A cost at each round relative to that at the first round: the median, and half the interquartile range."""

    ratios: list[float]
    ranges: list[float]

    @property
    def max_ratio(self) -> float:
        """The largest ratio between any two of the costs."""
        return max(self.ratios) / min(self.ratios)


def compute_growth(times: list[Row], clock: str) -> Growth:
    """Return the growth of the seconds of ``clock``; ratios are taken turn by turn, because machine speed varies."""
    first = times[0][clock]
    ratios = [[late / early for late, early in zip(at[clock], first, strict=True)] for at in times]
    return Growth([median(found) for found in ratios], [_compute_half_range(found) for found in ratios])


def _compute_half_range(values: list[float]) -> float:
    low, _, high = quantiles(values, n=4, method="inclusive")
    return (high - low) / 2


def render(result: dict[str, Any]) -> str:
    """Return the page as Markdown."""
    scale = result["scale"]
    rounds = scale["rounds"]
    head = " | ".join(f"round {round:,}" for round in rounds)
    line = "|---" * (len(rounds) + 2) + "|"
    return f"""# What a round costs, early and late

`{result["command"]}`, commit {result["commit"]}, {result["wall_seconds"] / 60:.0f} minutes; parts
that had finished before are reused and not counted.

A history of sinusoid tasks on disk, and runs on it that stand at different rounds: the network of
`deploy/sinusoid.toml`, one inner step, one meta-step of 10 tasks per round, a checkpoint every 25 rounds. Up to round
{scale["played"]:,} ({scale["rounds"][0]:,} for `all`) every round was played. Beyond that, runs were *fast-forwarded*:
round by round, the replay policy drew tasks and received measurements that were drawn from real ones, and the logs were
written; only the network did not learn. Then real rounds are played at each of these points and measured. Reservoir,
prioritised and coreset hold up to 1,000, 10,000 and 200 rounds. Until these are full, rounds cost slightly less.

## Time

CPU milliseconds per round: the minimum over {scale["turns"]} blocks of {scale["block"]} rounds ({scale["full_turns"]}
blocks of one round for `all`). In brackets: the ratio to round {rounds[0]:,}, computed turn by turn, as median ± half
the interquartile range.

| policy | {head} | within {MAX_RATIO - 1:.0%} of each other |
{line}
{"".join(_format_time_row(row, rounds) for row in result["costs"])}
Wall time relative to round {rounds[0]:,}. It includes other work on the machine.

| policy | {head} |
{line[4:]}
{"".join(_format_wall_row(row, rounds) for row in result["costs"])}
## Memory

Peak resident MB of a separate process that plays {2 * scale["block"]} rounds from that point. In brackets: anonymous
memory (without pages of files) afterwards.

| policy | {head} | within {MAX_RATIO - 1:.0%} of each other |
{line}
{"".join(_format_memory_row(row, rounds) for row in result["costs"])}
{_render_losses(result)}
![Time and memory by round](cost.png)
"""


def _pad(cells: list[str], rounds: list[int]) -> list[str]:
    return cells + ["-"] * (len(rounds) - len(cells))


def _format_row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |\n"


def _format_verdict(policy: str, apart: float) -> str:
    if policy == UNBOUNDED:
        return f"grows {apart:.3g}-fold, as it should" if apart > MAX_RATIO else f"NO GROWTH: {apart:.3f}"
    return f"yes: {apart:.3f}" if apart <= MAX_RATIO else f"NO: {apart:.3f}"


def _format_time_row(row: Row, rounds: list[int]) -> str:
    growth = compute_growth(row["times"], "cpu")
    cells = [
        f"{min(at['cpu']) * 1e3:.2f} ({ratio:.3f} ± {half:.3f})"
        for at, ratio, half in zip(row["times"], *growth, strict=True)
    ]
    policy = row["asked"]["policy"]
    return _format_row(policy, *_pad(cells, rounds), _format_verdict(policy, growth.max_ratio))


def _format_wall_row(row: Row, rounds: list[int]) -> str:
    cells = [f"{ratio:.3f} ± {half:.3f}" for ratio, half in zip(*compute_growth(row["times"], "wall"), strict=True)]
    return _format_row(row["asked"]["policy"], *_pad(cells, rounds))


def _format_memory_row(row: Row, rounds: list[int]) -> str:
    cells = [f"{at['peak'] / 1e6:.1f} ({at['anonymous'] / 1e6:.1f})" for at in row["memory"]]
    peaks = [at["peak"] for at in row["memory"]]
    policy = row["asked"]["policy"]
    verdict = f"{_format_verdict(policy, max(peaks) / min(peaks))} ({(max(peaks) - min(peaks)) / 1e6:.1f} MB)"
    return _format_row(policy, *_pad(cells, rounds), verdict)


def _render_losses(result: dict[str, Any]) -> str:
    if not result["losses"]:
        return ""
    scale = result["scale"]
    table = compare(result["losses"])
    rows = "".join(
        _format_row(
            one["policy"],
            format_spread(one["loss"], ".1f"),
            format_spread(one["above_all"], "+.2%"),
            str(one["loss"]["count"]),
        )
        for one in table
    )
    bounded = [one for one in table if one["policy"] != UNBOUNDED and one["above_all"]["count"]]
    best = min(bounded, key=lambda one: one["above_all"]["mean"], default=None)
    verdict = ""
    if best is not None:
        above = best["above_all"]["mean"]
        relation = "within" if above <= MAX_EXCESS else "NOT within"
        verdict = f"The best bounded policy, {best['policy']}, is {relation} {MAX_EXCESS:.0%} of `all`: {above:+.2%}.\n"
    return f"""## Loss

Rainbow digits, 10 classes, one support image and two query images per class, {scale["loss_rounds"]:,} rounds:
cumulative loss after adaptation; each task is scored before it is learned. Each round makes one inner step and one
meta-step on 25 tasks, or on all tasks for `all`. With the convolutional network of the demo, `all` would take too long,
so images are reduced to 14 x 14 and the network is a perceptron with two layers of 64. Rows with "100 tasks" or "4
steps" compute four times as many meta-gradients per round; this number does not grow with the round. Mean over seeds ±
standard error; *above `all`* is computed seed by seed. A reservoir of 1,000 has dropped no round by then, so it draws
what *uniform* draws.

| policy | cumulative loss | above `all` | seeds |
|---|---|---|---|
{rows}
{verdict}"""


def draw(result: dict[str, Any]) -> bytes:
    """Return a PNG with time and peak memory by round, relative to the first round."""
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for row in result["costs"]:
        rounds, name = [at["round"] for at in row["times"]], row["asked"]["policy"]
        peaks = [at["peak"] / row["memory"][0]["peak"] for at in row["memory"]]
        growth = compute_growth(row["times"], "cpu")
        left.errorbar(rounds, growth.ratios, growth.ranges, marker="o", capsize=3, label=name)
        right.plot(rounds, peaks, marker="o", label=name)
    _finish(left, "CPU time per round, relative to the first")
    _finish(right, "Peak resident memory, relative to the first")
    return as_png(figure, dpi=110)


def _finish(axes: Axes, title: str) -> None:
    axes.axhspan(1 / MAX_RATIO, MAX_RATIO, color="grey", alpha=0.2)
    axes.set(xscale="log", yscale="log", xlabel="round", title=title)
    axes.legend(fontsize=8)
