"""The page and the picture of what a round costs."""

from statistics import median, quantiles
from typing import Any, NamedTuple

from deploy.reports.report import as_png
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from tests.experiments.common.tables import Row, tell_spread
from tests.experiments.round_cost.loss import compare
from tests.experiments.round_cost.runs import UNBOUNDED

MOST_APART, MOST_ABOVE = 1.10, 0.02
"""How far costs may lie apart, as a ratio, and how far above full replay the loss of the best bounded policy may be."""


class Growth(NamedTuple):
    """A cost at each round as a ratio to that at the first: the median, and half the range between the quartiles."""

    ratios: list[float]
    ranges: list[float]

    @property
    def apart(self) -> float:
        """The largest ratio between any two of the costs."""
        return max(self.ratios) / min(self.ratios)


def grow(times: list[Row], clock: str) -> Growth:
    """Return how the seconds by a ``clock`` grow; ratios are taken turn by turn, for a machine has its moods."""
    first = times[0][clock]
    ratios = [[late / early for late, early in zip(at[clock], first, strict=True)] for at in times]
    return Growth([median(found) for found in ratios], [_half_range(found) for found in ratios])


def _half_range(values: list[float]) -> float:
    low, _, high = quantiles(values, n=4, method="inclusive")
    return (high - low) / 2


def render(result: dict[str, Any]) -> str:
    """Return the page as Markdown."""
    scale = result["scale"]
    rounds = scale["rounds"]
    head = " | ".join(f"round {round:,}" for round in rounds)
    line = "|---" * (len(rounds) + 2) + "|"
    return f"""# What a round costs, early and late

`{result["command"]}`, commit {result["commit"]}, {result["wall_seconds"] / 60:.0f} minutes; what was
finished before is not done again, and not counted.

A history of sinusoid tasks on disk and runs over it, each at its round: the network of `deploy/sinusoid.toml`, one
inner step, one meta-step of 10 tasks a round, a checkpoint every 25 rounds. Up to round {scale["played"]:,}
({scale["rounds"][0]:,} for `all`) every round was played. From there on runs were *walked*: the replay policy was asked
and told round by round as if they were played, with measurements drawn from real ones, and lines and plans were
written; only the network did not learn. Then real rounds are played at each place, and these are measured. Reservoir,
prioritised and coreset remember up to 1,000, 10,000 and 200 rounds: while these fill, rounds cost a little less.

## Time

Processor milliseconds a round, the least of {scale["turns"]} blocks of {scale["block"]} rounds ({scale["full_turns"]}
of one round for `all`); in brackets the ratio to round {rounds[0]:,}, turn by turn: median ± half the range between the
quartiles.

| policy | {head} | within {MOST_APART - 1:.0%} of each other |
{line}
{"".join(_time_row(row, rounds) for row in result["costs"])}
Wall time as a ratio to that at round {rounds[0]:,}; other work on the machine is in it.

| policy | {head} |
{line[4:]}
{"".join(_wall_row(row, rounds) for row in result["costs"])}
## Memory

Peak resident MB of a process of its own that plays {2 * scale["block"]} rounds there; in brackets what is not pages of
files, afterwards.

| policy | {head} | within {MOST_APART - 1:.0%} of each other |
{line}
{"".join(_memory_row(row, rounds) for row in result["costs"])}
{_losses(result)}
![Time and memory by round](cost.png)
"""


def _pad(cells: list[str], rounds: list[int]) -> list[str]:
    return cells + ["-"] * (len(rounds) - len(cells))


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |\n"


def _verdict(policy: str, apart: float) -> str:
    if policy == UNBOUNDED:
        return f"grows {apart:.3g}-fold, as it should" if apart > MOST_APART else f"NO GROWTH: {apart:.3f}"
    return f"yes: {apart:.3f}" if apart <= MOST_APART else f"NO: {apart:.3f}"


def _time_row(row: Row, rounds: list[int]) -> str:
    growth = grow(row["times"], "cpu")
    cells = [
        f"{min(at['cpu']) * 1e3:.2f} ({ratio:.3f} ± {half:.3f})"
        for at, ratio, half in zip(row["times"], *growth, strict=True)
    ]
    policy = row["asked"]["policy"]
    return _row(policy, *_pad(cells, rounds), _verdict(policy, growth.apart))


def _wall_row(row: Row, rounds: list[int]) -> str:
    cells = [f"{ratio:.3f} ± {half:.3f}" for ratio, half in zip(*grow(row["times"], "wall"), strict=True)]
    return _row(row["asked"]["policy"], *_pad(cells, rounds))


def _memory_row(row: Row, rounds: list[int]) -> str:
    cells = [f"{at['peak'] / 1e6:.1f} ({at['anonymous'] / 1e6:.1f})" for at in row["memory"]]
    peaks = [at["peak"] for at in row["memory"]]
    policy = row["asked"]["policy"]
    said = f"{_verdict(policy, max(peaks) / min(peaks))} ({(max(peaks) - min(peaks)) / 1e6:.1f} MB)"
    return _row(policy, *_pad(cells, rounds), said)


def _losses(result: dict[str, Any]) -> str:
    if not result["losses"]:
        return ""
    scale = result["scale"]
    table = compare(result["losses"])
    rows = "".join(
        _row(
            one["policy"],
            tell_spread(one["loss"], ".1f"),
            tell_spread(one["above_all"], "+.2%"),
            str(one["loss"]["count"]),
        )
        for one in table
    )
    bounded = [one for one in table if one["policy"] != UNBOUNDED and one["above_all"]["count"]]
    best = min(bounded, key=lambda one: one["above_all"]["mean"], default=None)
    verdict = ""
    if best is not None:
        above = best["above_all"]["mean"]
        said = "within" if above <= MOST_ABOVE else "NOT within"
        verdict = f"The best bounded policy, {best['policy']}, is {said} {MOST_ABOVE:.0%} of `all`: {above:+.2%}.\n"
    return f"""## Loss

Rainbow digits, 10 classes, one image a class to adapt on and two to be judged on, {scale["loss_rounds"]:,} rounds:
cumulative loss after adaptation, scored before learning. One inner step and one meta-step a round, of 25 tasks, or of
all for `all`, which would be out of reach with the convolutional network of the demo: images are halved to 14 x 14 and
learned by a perceptron of two layers of 64. Rows that say so take four times as many meta-gradients a round: still as
many late as early. Mean over seeds ± standard error; *above `all`* is taken seed by seed. A reservoir of 1,000 has lost
none of so many rounds, so it draws what *uniform* draws.

| policy | cumulative loss | above `all` | seeds |
|---|---|---|---|
{rows}
{verdict}"""


def draw(result: dict[str, Any]) -> bytes:
    """Return a PNG: time and peak memory by round, as ratios to those at the first."""
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for row in result["costs"]:
        rounds, name = [at["round"] for at in row["times"]], row["asked"]["policy"]
        peaks = [at["peak"] / row["memory"][0]["peak"] for at in row["memory"]]
        growth = grow(row["times"], "cpu")
        left.errorbar(rounds, growth.ratios, growth.ranges, marker="o", capsize=3, label=name)
        right.plot(rounds, peaks, marker="o", label=name)
    _finish(left, "Processor time a round / that at the first")
    _finish(right, "Peak resident memory / that at the first")
    return as_png(figure, dpi=110)


def _finish(axes: Axes, title: str) -> None:
    axes.axhspan(1 / MOST_APART, MOST_APART, color="grey", alpha=0.2)
    axes.set(xscale="log", yscale="log", xlabel="round", title=title)
    axes.legend(fontsize=8)
