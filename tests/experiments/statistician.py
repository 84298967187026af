"""A neural statistician on sets of numbers: what its code says of a set, and how near its density is to the truth."""

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from online_meta.batches import only_tensor
from online_meta.inner import fast_weights
from online_meta.learners.ftml import FollowTheMetaLeader
from online_meta.prediction import nll_of
from online_meta.replay import generator
from online_meta.types import Batch
from streams.sources import number_sets
from streams.sources.number_sets import FAMILIES, Drawn

from tests.experiments.beliefs.page import Bar, judge, list_figures
from tests.experiments.beliefs.runs import HELD_OUT_SEED, Contestant, answer, make_settings
from tests.experiments.common.playing import play_stream
from tests.experiments.common.tables import (
    COLOURS,
    Row,
    choose_labels,
    format_mean,
    load_row,
    read_command,
    read_commit,
    run_options,
    run_rows,
    save_row,
    write_files,
)

NAME, SOURCE = "statistician", "number_sets"
ROUNDS, BATCHING = 600, "traced"
CONTESTANTS = {NAME: Contestant("neural statistician", ("meta.steps_per_round=5",))}
"""The learners of the table, by name."""

SUPPORT, QUERY = 20, 100
"""Numbers of a set of the stream to adapt to, and from which it is learned."""
NUMBERS = 200
"""Numbers of a held-out set, all of which are the support set."""
FITTED, TESTED, COMPARED = 500, 500, 200
"""Held-out sets from which codes are read linearly, on which that is tested, and whose densities are compared."""
NODES = 400
"""Nodes of a divergence, each with the same probability under the true density."""
MEANS = (np.arange(400) + 0.5) / 200 - 1
VARIANCES = 0.5 + 1.5 * (np.arange(300) + 0.5) / 300
"""The grid over which the exact posterior of a set is summed: midpoints of equal cells of the prior's range."""
DRAWN, CURVE = 400, 161
"""Codes in the picture, and the points of each of its densities."""

Reals = NDArray[np.float64]


class Shape(NamedTuple):
    """A family with mean 0 and variance 1: its quantile function, and the logarithm of its density."""

    quantile: Callable[[Reals], Reals]
    log_density: Callable[[Reals], Reals]


SHAPES = {
    "exponential": Shape(lambda u: -np.log1p(-u) - 1, lambda z: np.where(z >= -1, -(z + 1), -np.inf)),
    "gaussian": Shape(
        lambda u: torch.special.ndtri(torch.from_numpy(u)).numpy(), lambda z: -0.5 * (z**2 + math.log(2 * math.pi))
    ),
    "uniform": Shape(
        lambda u: math.sqrt(3) * (2 * u - 1),
        lambda z: np.where(np.abs(z) <= math.sqrt(3), -math.log(2 * math.sqrt(3)), -np.inf),
    ),
    "laplacian": Shape(
        lambda u: np.sign(u - 0.5) * -np.log1p(-2 * np.abs(u - 0.5)) / math.sqrt(2),
        lambda z: -math.sqrt(2) * np.abs(z) - 0.5 * math.log(2),
    ),
}
"""The families of the source, in its order."""


class Sets(NamedTuple):
    """Held-out sets: support sets, and the distribution of each."""

    batches: list[Batch]
    drawn: list[Drawn]

    def targets(self) -> Reals:
        """Return the mean and the logarithm of the variance of each distribution, (n, 2)."""
        return np.array([[one.mean, math.log(one.variance)] for one in self.drawn])

    def families(self) -> NDArray[np.int64]:
        """Return the index of the family of each distribution, (n,)."""
        return np.array([list(FAMILIES).index(one.family) for one in self.drawn])


def make_sets(seed: int, count: int) -> Sets:
    """Return the first sets of a stream, with the distributions that they are drawn from."""
    options = number_sets.Settings(support=NUMBERS, query=1)
    batches = [number_sets.make_task(options, seed, t).support for t in range(count)]
    return Sets(batches, [number_sets.draw_distribution(generator(seed, t)) for t in range(count)])


def run(name: str, contestant: Contestant, seed: int, rounds: int, work: Path) -> Row:
    """Return the row of one run; a saved row of the same configuration is loaded instead of computed."""
    asked = {
        "name": name,
        "seed": seed,
        "rounds": rounds,
        "title": contestant.title,
        "changes": [*contestant.changes],
    }
    file = work / f"{name}-{seed}.json"
    if before := load_row(file, asked):
        return before
    options = number_sets.Settings(support=SUPPORT, query=QUERY)
    settings = make_settings(
        SOURCE, replace(contestant, changes=(*contestant.changes, f"engine.batching={BATCHING}")), seed
    )
    tasks = (number_sets.make_task(options, seed, t) for t in range(rounds))
    seconds = 0.0
    for played in play_stream(settings, "ftml", tasks, work / "programs"):
        seconds += played.seconds
    assert isinstance(played.learner, FollowTheMetaLeader)
    measured = measure(played.learner, make_sets(HELD_OUT_SEED, FITTED + TESTED))
    return save_row(file, {"asked": asked, "seconds": seconds, **measured})


def measure(learner: FollowTheMetaLeader, sets: Sets) -> dict[str, Any]:
    """Return the figures of a learner on held-out sets, and what is drawn of them."""
    codes, targets, families = encode(learner, sets.batches), sets.targets(), sets.families()
    fitted, tested = slice(FITTED), slice(FITTED, None)
    found = find_determination(read_linearly(codes[fitted], targets[fitted], codes[tested]), targets[tested])
    chosen = classify(codes[fitted], families[fitted], codes[tested])
    compared = range(FITTED, FITTED + COMPARED)
    return {
        "determination": found,
        "accuracy": float((chosen == families[tested]).mean()),
        "divergence": float(np.mean([diverge(learner, sets.batches[t], sets.drawn[t]) for t in compared])),
        **find_ceilings(sets),
        "gaussian_divergence": float(np.mean([diverge_gaussian(sets.drawn[t].family) for t in compared])),
        "drawn": draw_sets(learner, sets, codes),
    }


def find_ceilings(sets: Sets) -> dict[str, Any]:
    """Return what who knows the families can reach: the accuracy, and R^2 of the posterior means."""
    exact = [infer_exactly(only_tensor(batch.y).double().numpy()) for batch in sets.batches[FITTED:]]
    families, targets = sets.families()[FITTED:], sets.targets()[FITTED:]
    return {
        "bayes_accuracy": float(np.mean([one.family.argmax() for one in exact] == families)),
        "bayes_determination": find_determination(np.array([[one.mean, one.log_variance] for one in exact]), targets),
    }


def encode(learner: FollowTheMetaLeader, batches: Sequence[Batch]) -> Reals:
    """Return the posterior mean of the code of each set, (n, d)."""
    inner, meta = learner.inner, learner.engine.meta()
    assert inner.rule.infer is not None
    phi = fast_weights(inner, meta.weights)
    with torch.no_grad():
        found = [inner.rule.infer.posterior(meta.rule, phi, batch, {}).mean["context"] for batch in batches]
    return np.asarray(torch.stack(found).double().numpy())


def read_linearly(codes: Reals, targets: Reals, others: Reals) -> Reals:
    """Return what the linear regression of ``targets`` on ``codes`` predicts for other codes."""
    weights = np.linalg.lstsq(_extend(codes), targets, rcond=None)[0]
    return np.asarray(_extend(others) @ weights)


def _extend(codes: Reals) -> Reals:
    return np.concatenate([codes, np.ones((len(codes), 1))], 1)


def find_determination(predicted: Reals, targets: Reals) -> list[float]:
    """Return R^2 = 1 - sum (y - y')^2 / sum (y - mean y)^2 of each column."""
    rest, whole = ((targets - other) ** 2 for other in (predicted, targets.mean(0)))
    return [float(one) for one in 1 - rest.sum(0) / whole.sum(0)]


def classify(codes: Reals, families: NDArray[np.int64], others: Reals) -> NDArray[np.int64]:
    """Return the family whose centroid is nearest to each of ``others``, in units of the spread within families."""
    kinds = np.unique(families)
    centroids = np.array([codes[families == kind].mean(0) for kind in kinds])
    around = codes - centroids[np.searchsorted(kinds, families)]
    spread = around.T @ around / len(codes)
    spread += 1e-6 * spread.diagonal().mean() * np.eye(len(spread))  # Entries that never differ would divide by 0.
    root = np.linalg.cholesky(np.linalg.inv(spread))
    distances = np.linalg.norm((others[:, None] - centroids) @ root, axis=-1)
    return np.asarray(kinds[distances.argmin(1)])


def log_density_of(drawn: Drawn, y: Reals) -> Reals:
    """Return the logarithm of the density of a distribution at ``y``."""
    std = math.sqrt(drawn.variance)
    return SHAPES[drawn.family].log_density((y - drawn.mean) / std) - math.log(std)


def log_density_by(learner: FollowTheMetaLeader, support: Batch, y: Reals) -> Reals:
    """Return the logarithm of the density that a learner answers with after a support set, at ``y``."""
    prediction = answer(learner, support, torch.zeros(len(y), 1))
    return np.asarray(-nll_of(prediction, torch.from_numpy(y)).double().numpy())


def diverge(learner: FollowTheMetaLeader, support: Batch, drawn: Drawn) -> float:
    """Return KL(true density || answer) in nats, by the midpoint rule over the quantiles of the true density."""
    shares = (np.arange(NODES) + 0.5) / NODES
    y = drawn.mean + math.sqrt(drawn.variance) * SHAPES[drawn.family].quantile(shares)
    return float((log_density_of(drawn, y) - log_density_by(learner, support, y)).mean())


@cache
def diverge_gaussian(family: str) -> float:
    """Return KL(true density || the Gaussian of the same mean and variance): no Gaussian is nearer."""
    z = SHAPES[family].quantile((np.arange(100 * NODES) + 0.5) / (100 * NODES))
    return float((SHAPES[family].log_density(z) - SHAPES["gaussian"].log_density(z)).mean())


class Posterior(NamedTuple):
    """What a set says exactly: the probabilities of the families, and the means of the mean and the log variance."""

    family: Reals
    mean: float
    log_variance: float


def infer_exactly(numbers: Reals) -> Posterior:
    """Return the exact posterior of a set of numbers (n,), summed over ``MEANS`` and ``VARIANCES``."""
    logs = sum_log_densities(numbers)
    weights = np.exp(logs - logs.max())
    weights /= weights.sum()
    return Posterior(
        weights.sum((1, 2)),
        float(weights.sum((0, 2)) @ MEANS),
        float(weights.sum((0, 1)) @ np.log(VARIANCES)),
    )


def sum_log_densities(numbers: Reals) -> Reals:
    """Return log p(numbers | family, mean, variance), (families, means, variances), over the grid."""
    n, low, high = len(numbers), numbers.min(), numbers.max()
    m, s = MEANS[:, None], np.sqrt(VARIANCES)
    around = np.abs(numbers - m)
    edge = math.sqrt(3) * s
    each = {
        "exponential": np.where(low >= m - s, -(numbers.sum() - n * (m - s)) / s, -np.inf),
        "gaussian": -0.5 * ((around**2).sum(1)[:, None] / s**2 + n * math.log(2 * math.pi)),
        "uniform": np.where((low >= m - edge) & (high <= m + edge), -n * math.log(2 * math.sqrt(3)), -np.inf),
        "laplacian": -math.sqrt(2) * around.sum(1)[:, None] / s - 0.5 * n * math.log(2),
    }
    return np.stack([each[family] - n * np.log(s) for family in FAMILIES])


def draw_sets(learner: FollowTheMetaLeader, sets: Sets, codes: Reals) -> dict[str, Any]:
    """Return what is drawn: codes with what they stand for, and for one set of each family both densities."""
    shown = slice(FITTED, FITTED + DRAWN)
    densities = []
    for family in FAMILIES:
        t = next(t for t, one in enumerate(sets.drawn) if t >= FITTED and one.family == family)
        drawn = sets.drawn[t]
        y = drawn.mean + math.sqrt(drawn.variance) * np.linspace(-3.5, 3.5, CURVE)
        found = [
            np.exp(log).tolist() for log in (log_density_of(drawn, y), log_density_by(learner, sets.batches[t], y))
        ]
        densities.append({"family": family, "y": y.tolist(), "true": found[0], "own": found[1]})
    return {
        "codes": codes[shown].tolist(),
        "families": sets.families()[shown].tolist(),
        "targets": sets.targets()[shown].tolist(),
        "densities": densities,
    }


BARS = [
    Bar(NAME, "R² of the mean", 0.95, None, lambda rows: rows[NAME]["determination"][0]),
    Bar(NAME, "R² of the log variance", 0.90, None, lambda rows: rows[NAME]["determination"][1]),
    Bar(NAME, "accuracy of the family by the nearest centroid", 0.80, None, lambda rows: rows[NAME]["accuracy"]),
    Bar(NAME, "KL(true density, answer), nats", None, 0.05, lambda rows: rows[NAME]["divergence"]),
]


def render(result: Row) -> str:
    """Return the page as Markdown."""
    rows = result["rows"]
    text = f"""# Sets of numbers: what a neural statistician says of them

`{result["command"]}`, commit {result["commit"]}.

A task is a set of numbers from an exponential, Gaussian, uniform or Laplacian distribution, with a mean uniform in -1
to 1 and a variance uniform in 0.5 to 2 (Edwards & Storkey, ICLR 2017). A learner makes a code of 32 numbers of a set,
and from the code a density. It is FTML on the stream: each round brings {QUERY} numbers, and {SUPPORT} more to adapt
to, and five meta-steps on 16 sets of the past follow. At the end it is given held-out sets of {NUMBERS} numbers. A
linear regression from the code to the mean and the log variance, and the centroids of the families, in units of the
spread within them, are fitted on {FITTED:,} sets and tested on {TESTED:,} others. The divergence KL(true density,
answer) is the mean over {COMPARED} of these.

"""
    columns = ["learner", "seeds", "R² of the mean", "R² of the log variance", "accuracy of the family"]
    columns += ["KL in nats", "seconds"]
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    for name in dict.fromkeys(row["asked"]["name"] for row in rows):
        own = [row for row in rows if row["asked"]["name"] == name]
        cells = [own[0]["asked"]["title"], str(len(own))]
        cells += [format_mean([row["determination"][place] for row in own], ".3f") for place in (0, 1)]
        cells += [format_mean([row[key] for row in own], ".3f") for key in ("accuracy", "divergence")]
        lines.append(f"| {' | '.join([*cells, format_mean([row['seconds'] for row in own], '.0f')])} |")
    best = [f"{one:.3f}" for one in (*rows[0]["bayes_determination"], rows[0]["bayes_accuracy"])]
    lines += [
        f"| *exact Bayes, which knows the families* | | {' | '.join(best)} | | |",
        f"| *the nearest Gaussian to the true density* | | | | | {rows[0]['gaussian_divergence']:.3f} | |",
        "",
        "Means over the seeds ± standard error. Seconds are CPU seconds of a run, on one thread.",
        "",
        *list_figures(result["figures"]),
        f"![Codes by family, mean and variance, and densities]({NAME}.png)",
        "",
    ]
    return text + "\n".join(lines)


def draw(rows: Sequence[Row]) -> bytes:
    """Return the picture as PNG: the codes of the first run by family, mean and variance, and four densities."""
    drawn = rows[0]["drawn"]
    codes, targets = np.array(drawn["codes"]), np.array(drawn["targets"])
    axes_of_spread = np.linalg.svd(codes - codes.mean(0), full_matrices=False)[2]
    places = (codes - codes.mean(0)) @ axes_of_spread.T
    figure = Figure(figsize=(12, 9), layout="constrained")
    grid = figure.add_gridspec(2, 1, height_ratios=(2, 1))
    above, below = (figure.add_subfigure(cell) for cell in (grid[0], grid[1]))
    panels = above.subplots(2, 3)
    for line, (first, second) in zip(panels, ((0, 1), (0, 2)), strict=True):
        for panel in line:
            panel.set(xlabel=f"code, axis {first + 1}", ylabel=f"axis {second + 1}")
        _draw_codes(figure, line, places[:, [first, second]], drawn["families"], targets)
    for panel, one in zip(below.subplots(1, len(drawn["densities"])), drawn["densities"], strict=True):
        panel.fill_between(one["y"], one["true"], color="#999999", alpha=0.4, linewidth=0, label="true")
        panel.plot(one["y"], one["own"], color=COLOURS[0], label="answer")
        panel.set_title(one["family"], fontsize=9, loc="left")
        panel.tick_params(labelsize=7)
        panel.legend(fontsize=7)
    written = io.BytesIO()
    figure.savefig(written, format="png", dpi=80)
    return written.getvalue()


def _draw_codes(figure: Figure, line: Sequence[Axes], places: Reals, families: Sequence[int], targets: Reals) -> None:
    """Draw the codes three times: coloured by family, by mean and by variance."""
    for kind, family in enumerate(FAMILIES):
        own = places[np.array(families) == kind]
        line[0].scatter(own[:, 0], own[:, 1], s=6, color=COLOURS[kind], label=family)
    line[0].legend(fontsize=7)
    line[0].set_title("family", fontsize=9, loc="left")
    for panel, title, values in zip(
        line[1:], ("mean", "variance"), (targets[:, 0], np.exp(targets[:, 1])), strict=True
    ):
        shown = panel.scatter(places[:, 0], places[:, 1], s=6, c=values, cmap="viridis")
        figure.colorbar(shown, ax=panel)
        panel.set_title(title, fontsize=9, loc="left")


def compose(rows: list[Row]) -> dict[str, Any]:
    """Return the result of finished rows: the rows without what is drawn, and the bars."""
    command = read_command(f"tests.experiments.{NAME}")
    kept = [{key: value for key, value in row.items() if key != "drawn"} for row in rows]
    return {"command": command, "commit": read_commit(), "rows": kept, "figures": judge(rows, BARS, command)}


@click.command(help=f"Write {NAME}.json, .md and .png into OUT; runs that are finished in WORK are reused.")
@run_options(NAME, ROUNDS)
def main(rounds: int, seeds: int, only: tuple[str, ...], jobs: int, work: Path, out: Path) -> None:
    """Run the learners, and write the table."""

    def write(rows: list[Row]) -> None:
        result = compose(rows)
        write_files(out, NAME, result, render(result), draw(rows))

    names = choose_labels(only, [*CONTESTANTS])
    run_rows(
        jobs, run, [(name, CONTESTANTS[name], seed, rounds, work) for seed in range(seeds) for name in names], write
    )
    click.echo((out / f"{NAME}.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
