"""Compare replays of one history task by task: paired differences with intervals, as tables, a plot and files."""

import json
import math
from collections.abc import Iterable, Mapping
from itertools import combinations
from pathlib import Path
from statistics import stdev
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from deploy.config.config import Config
from deploy.reports.report import INKS, WINDOW, as_png, style_axes, trailing_mean
from online_meta.regret.differences import MIN_ROUNDS, Differences, confidence_sequence, judge, sum_differences
from online_meta.regret.ledger import charge_for, is_finite_loss
from online_meta.regret.verdict import display_name
from streams.atomic_files import replace_file
from trainers.journal.jsonl import LineReader
from trainers.journal.run_files import RunFiles

Floats = NDArray[np.float64]
BySeed = dict[int, dict[str, Floats]]
"""One value for each round, (rounds,), by seed and by the scored name of an answer."""

POINTS = 400
"""Points of a curve at most."""


class Entry(NamedTuple):
    """What the replays of one configuration recorded.

    Attributes:
        name: of the configuration.
        answer: the scored name of its answer.
        level_margin: the share of its mean loss within which another configuration counts as level.
        losses: query losses after adaptation; NaN in a round that counts for no learner.
        accuracies: NaN where there is none.
        folders: of the replays, by seed.
    """

    name: str
    answer: str
    level_margin: float
    losses: BySeed
    accuracies: BySeed
    folders: dict[int, Path]

    def answers(self) -> dict[int, Floats]:
        """Return the losses of the answer by seed."""
        return {seed: losses[self.answer] for seed, losses in self.losses.items()}


class Pair(NamedTuple):
    """Two configurations, or two seeds of one, that played the same tasks.

    Attributes:
        name: of the first one.
        against: name of the other one.
        differences: by seed, the loss of the first one minus that of the other one, (rounds,); NaN in a round that does
            not count for both.
        margin: the difference in the mean loss up to which the two count as level.
    """

    name: str
    against: str
    differences: dict[int, Floats]
    margin: float

    def average(self) -> Floats:
        """Return the mean of the differences over the seeds, (rounds,)."""
        mean: Floats = np.mean([*self.differences.values()], axis=0)
        return mean


def read_entries(replays: Mapping[str, tuple[Config, Mapping[int, Path]]], rounds: int) -> list[Entry]:
    """Read what replays recorded in their first rounds.

    A loss that is not finite is charged, as in the ledger: at the cap of losses, or at the largest finite loss of the
    round in any of the replays.

    Args:
        replays: by the name of the configuration: the configuration, and the folder of the replay with each seed.
        rounds: the number of rounds.
    """
    entries, ceilings = [], np.full(rounds, -math.inf)
    for name, (config, folders) in replays.items():
        losses: BySeed = {}
        accuracies: BySeed = {}
        for seed, folder in folders.items():
            losses[seed], accuracies[seed], own = _read_rounds(folder, rounds, config.regret.loss_cap)
            for found in (losses[seed], accuracies[seed]):  # If no round counts, no line has the answer's name.
                found.setdefault(config.answering, np.full(rounds, math.nan))
            ceilings = np.maximum(ceilings, own)
        margin = config.regret.level_margin
        entries.append(Entry(name, config.answering, margin, losses, accuracies, dict(folders)))
    for entry in entries:
        for found in entry.losses.values():
            for learner, values in found.items():
                found[learner] = np.where(np.isinf(values), ceilings, values)
    return entries


def _read_rounds(folder: Path, rounds: int, cap: float) -> tuple[dict[str, Floats], dict[str, Floats], Floats]:
    """Return the losses and accuracies of a replay by scored name, and what a loss that is not finite is charged at.

    Such a loss is infinite here.
    """
    losses: dict[str, Floats] = {}
    accuracies: dict[str, Floats] = {}
    charges = np.full(rounds, cap)
    for line in LineReader(RunFiles(folder).rounds).lines():
        if line["round"] >= rounds:
            break
        if line["skipped"] is not None:
            continue
        at, scores = line["round"], line["learners"]
        charges[at] = charge_for((score["loss_after"] for score in scores.values()), cap)
        for name, score in scores.items():
            for found in (losses, accuracies):
                found.setdefault(name, np.full(rounds, math.nan))
            losses[name][at] = score["loss_after"] if is_finite_loss(score["loss_after"]) else math.inf
            accuracies[name][at] = math.nan if score["accuracy"] is None else score["accuracy"]
    return losses, accuracies, charges


def pair_entries(entries: Iterable[Entry]) -> list[Pair]:
    """Return each two configurations that have a seed in common; the one that comes first is the other one."""
    pairs = []
    for other, own in combinations(entries, 2):
        losses, others = own.answers(), other.answers()
        if both := [seed for seed in losses if seed in others]:
            differences = {seed: losses[seed] - others[seed] for seed in both}
            pairs.append(Pair(own.name, other.name, differences, _find_margin(other, both)))
    return pairs


def pair_seeds(entry: Entry) -> list[Pair]:
    """Return each seed of a configuration with its first seed."""
    first, *seeds = (losses := entry.answers())
    label = f"{entry.name}, seed {{}}".format
    margin = _find_margin(entry, [first])
    return [Pair(label(seed), label(first), {seed: losses[seed] - losses[first]}, margin) for seed in seeds]


def _find_margin(entry: Entry, seeds: Iterable[int]) -> float:
    losses = entry.answers()
    return entry.level_margin * abs(_mean([_mean(losses[seed]) for seed in seeds]) or 0.0)


def _mean(values: Iterable[float | None]) -> float | None:
    """Return the mean of the values that are there; None without any."""
    found = [float(value) for value in values if value is not None and not math.isnan(value)]
    return math.fsum(found) / len(found) if found else None


def _spread(values: Iterable[float | None]) -> float | None:
    """Return the standard deviation of the values that are there; None for fewer than two."""
    found = [value for value in values if value is not None]
    return stdev(found) if len(found) > 1 else None


def compare_entries(entries: list[Entry]) -> dict[str, Any]:
    """Return the comparison as JSON: all configurations with all learners by name, and all differences."""
    return {
        "configurations": {
            entry.name: {
                "answer": entry.answer,
                **_summarise(entry, entry.answer),
                "folders": {str(seed): str(folder) for seed, folder in entry.folders.items()},
                "learners": {name: _summarise(entry, name) for name in next(iter(entry.losses.values()))},
                "seed_differences": [describe_pair(pair) for pair in pair_seeds(entry)],
            }
            for entry in entries
        },
        "differences": [describe_pair(pair) for pair in pair_entries(entries)],
    }


def _summarise(entry: Entry, learner: str) -> dict[str, Any]:
    """Return the figures of a learner with each seed, their means over the seeds, and the spread of the mean loss."""
    seeds = {}
    for seed, found in entry.losses.items():
        losses, accuracies = found[learner], entry.accuracies[seed][learner]
        counted = losses[~np.isnan(losses)]
        seeds[str(seed)] = {
            "rounds": len(counted),
            "mean_loss": _mean(counted),
            "mean_loss_last_100": _mean(losses[-100:]),
            "mean_accuracy": _mean(accuracies),
            "cumulative_loss": math.fsum(counted),
        }
    keys = ("mean_loss", "mean_loss_last_100", "mean_accuracy", "cumulative_loss")
    means = {key: _mean(one[key] for one in seeds.values()) for key in keys}
    return {**means, "spread": _spread(one["mean_loss"] for one in seeds.values()), "seeds": seeds}


def describe_pair(pair: Pair) -> dict[str, Any]:
    """Return the mean difference in loss of a pair, its interval and what that shows, as JSON.

    The difference in a round is averaged over the seeds. Its mean over the rounds has an interval that holds at all
    rounds; the spread is the standard deviation of the mean difference from seed to seed.
    """
    sums = sum_differences(pair.average())
    interval = confidence_sequence(sums)
    means = {str(seed): _mean(differences) for seed, differences in pair.differences.items()}
    return {
        "name": pair.name,
        "against": pair.against,
        "rounds": sums.rounds,
        "mean": sums.mean(),
        "cumulative": sums.total,
        "interval": interval,
        "verdict": judge(interval, pair.margin),
        "margin": pair.margin,
        "seeds": means,
        "spread": _spread(means.values()),
    }


class TextTable(NamedTuple):
    """A table as text: its title, the names of its columns, and its rows."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]


def tabulate(comparison: dict[str, Any]) -> list[TextTable]:
    """Return the configurations and their differences as tables; of a single configuration, those of its seeds.

    Args:
        comparison: result of ``compare_entries``, with the number of ``rounds``.
    """
    found, differences = comparison["configurations"], comparison["differences"]
    if len(found) == 1:
        differences = next(iter(found.values()))["seed_differences"]
    losses = _drop_empty_columns(
        "Query loss after adaptation, mean over the seeds",
        ("configuration", "answer", "seeds", "loss", "spread", "last 100", "accuracy", "cumulative"),
        [
            (
                name,
                display_name(one["answer"]),
                str(len(one["seeds"])),
                *(_format(one[key], "{:.4f}") for key in ("mean_loss", "spread", "mean_loss_last_100")),
                _format(one["mean_accuracy"], "{:.1%}"),
                _format(one["cumulative_loss"], "{:.2f}"),
            )
            for name, one in found.items()
        ],
    )
    rows: list[tuple[str, ...]] = [
        (
            one["name"],
            one["against"],
            "" if one["rounds"] == comparison["rounds"] else str(one["rounds"]),
            _format(one["mean"], "{:+.4f}"),
            "{:+.4f} to {:+.4f}".format(*one["interval"]) if one["interval"] else "",
            _format(one["spread"], "{:.4f}"),
            one["verdict"],
        )
        for one in differences
    ]
    columns = ("configuration", "against", "rounds", "mean", "95 % interval", "spread", "it is")
    pairs = _drop_empty_columns("Difference in loss per round; below 0 is better", columns, rows)
    return [losses, pairs] if rows else [losses]


def _drop_empty_columns(title: str, columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> TextTable:
    kept = [at for at in range(len(columns)) if any(row[at] for row in rows)]
    return TextTable(title, tuple(columns[at] for at in kept), [tuple(row[at] for at in kept) for row in rows])


def _format(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def render(comparison: dict[str, Any]) -> str:
    """Return the comparison as Markdown; its picture is comparison.png."""
    lines = ["# Comparison", "", f"{comparison['rounds']} rounds of `{comparison['history']}`.", ""]
    for table in tabulate(comparison):
        lines += [f"## {table.title}", ""]
        lines += [f"| {' | '.join(row)} |" for row in (table.columns, ["---"] * len(table.columns), *table.rows)]
        lines += [""]
    return "\n".join([*lines, NOTES, ""])


NOTES = f"""Each task is scored before it is learned. A *difference* is that of the losses on the same task, averaged
over the seeds and then over the rounds. Its 95 % interval may be looked at after every round; with fewer than
{MIN_ROUNDS} rounds there is none. It is about these seeds: the *spread*, a standard deviation from seed to seed, shows
how much others may differ. *Level* means that the interval contains 0 and is narrow.

![Losses, and cumulative differences in loss with their intervals](comparison.png)
"""


def write_comparison(folder: Path, comparison: dict[str, Any], entries: list[Entry]) -> None:
    """Write comparison.json, comparison.md and comparison.png; raises ``OSError`` if a file cannot be written."""
    files = {
        "comparison.json": json.dumps(comparison, indent=1, allow_nan=False).encode(),
        "comparison.md": render(comparison).encode(),
        "comparison.png": plot(entries),
    }
    for name, content in files.items():
        replace_file(folder / name, content, durable=False)


def plot(entries: list[Entry]) -> bytes:
    """Return a PNG: the losses, and the cumulative differences from the first configuration with their intervals.

    Of a single configuration, the differences are those of its seeds from its first seed.
    """
    figure = Figure(figsize=(11, 4.4), dpi=130, layout="constrained")
    losses, gaps = figure.subplots(1, 2)
    first = entries[0].name
    pairs = [pair for pair in pair_entries(entries) if pair.against == first] or pair_seeds(entries[0])
    colours = {entry.name: INKS[at % len(INKS)] for at, entry in enumerate(entries)}
    for entry in entries:
        curves = [trailing_mean([None if math.isnan(v) else v for v in one]) for one in entry.answers().values()]
        for curve in curves if len(curves) > 1 else ():
            losses.plot(np.arange(1, len(curve) + 1), curve, color=colours[entry.name], lw=0.5, alpha=0.5)
        mean = np.mean(curves, axis=0)
        losses.plot(np.arange(1, len(mean) + 1), mean, color=colours[entry.name], label=entry.name)
    for at, pair in enumerate(pairs, 1):
        _plot_pair(gaps, pair, colours.get(pair.name, INKS[at % len(INKS)]))
    gaps.axhline(0, color="#888888", lw=0.8)
    against = pairs[0].against if pairs else first
    for axes, title, unit in (
        (losses, f"Loss on new tasks (mean of {WINDOW} rounds); each seed is a thin line", "query loss"),
        (gaps, f"Cumulative loss minus that of {against}, with 95 % interval", "difference in cumulative loss"),
    ):
        axes.set_title(title, fontsize=11)
        axes.set_xlabel("round")
        axes.set_ylabel(unit)
        style_axes(axes)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=9)
    return as_png(figure)


def _plot_pair(axes: Axes, pair: Pair, colour: str) -> None:
    """Draw the cumulative difference of a pair, its interval as a band, and that of each seed as a thin line."""
    mean = pair.average()
    known = ~np.isnan(mean)
    values = np.where(known, mean, 0.0)
    counts, totals, squares = np.cumsum(known), np.cumsum(values), np.cumsum(values**2)
    points = np.unique(np.linspace(1, len(mean), min(len(mean), POINTS)).astype(int))
    axes.plot(points, totals[points - 1], color=colour, label=pair.name)
    for differences in pair.differences.values() if len(pair.differences) > 1 else ():
        axes.plot(points, np.nancumsum(differences)[points - 1], color=colour, lw=0.5, alpha=0.6)
    sums = [Differences(int(counts[p - 1]), float(totals[p - 1]), float(squares[p - 1])) for p in points]
    bands = [(p, one.rounds, found) for p, one in zip(points, sums, strict=True) if (found := confidence_sequence(one))]
    if bands:
        at, rounds, ends = zip(*bands, strict=True)
        low, high = (np.multiply(rounds, end) for end in zip(*ends, strict=True))
        axes.fill_between(at, low, high, color=colour, alpha=0.15, lw=0)
