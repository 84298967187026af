"""Streams that are not stationary: FTML by several replay policies, and a mixture of meta-initialisations."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import click
import numpy as np

import streams.sources
from deploy.experiments.playing import play_stream
from deploy.experiments.tables import Row, choose_labels, keep, read_kept, run_options, run_rows, tell_mean, write_table
from deploy.plot import COLOURS, as_png, tidy
from online_meta import registry
from online_meta.regret import LEARNER
from online_meta.types import Task
from trainers.settings import (
    EngineSettings,
    InnerSettings,
    MetaSettings,
    ModelSettings,
    RegretSettings,
    TrainerSettings,
)

NAME = "non_stationary"
WINDOW = 20
MIXTURE = "dp_mixture"


class Stream(NamedTuple):
    """A stream of the table: the source, and its options for so many rounds."""

    source: str
    options: dict[str, Any]


class Entry(NamedTuple):
    """One run: a learner by its label on a stream."""

    stream: str
    label: str
    rounds: int
    seed: int


STREAMS = {
    "drifting": Stream("drifting_sinusoids", {"period": 50.0}),
    "recurring": Stream("recurring_functions", {"spell": 10}),
    "heavy-tailed": Stream("heavy_tailed_functions", {}),
}
POLICIES: dict[str, tuple[str, dict[str, Any]]] = {
    "uniform": ("uniform", {}),
    "recent": ("recent", {"window": WINDOW}),
    "reservoir": ("reservoir", {"size": WINDOW}),
    "prioritised": ("prioritised", {}),
    "all": ("all", {}),
}
LABELS = ("uniform", "mixture", *[label for label in POLICIES if label != "uniform"])


def settings_of(label: str, seed: int) -> TrainerSettings:
    """Return the settings of a run: a small network and budget, with the replay policy of a label."""
    policy, options = POLICIES.get(label, POLICIES["uniform"])
    return TrainerSettings(
        ModelSettings("trainers.models:mlp", {"inputs": 1, "outputs": 1, "hidden": [40, 40]}, loss="mse"),
        InnerSettings(steps=3, lr=0.02),
        MetaSettings(lr=0.005, steps_per_round=3, batch=5, replay=policy, replay_options=options),
        regret=RegretSettings(comparator=(), baselines=(MIXTURE,) if label == "mixture" else ()),
        engine=EngineSettings(how="traced"),
        seed=seed,
    )


def make_tasks(stream: Stream, seed: int, rounds: int) -> list[Task]:
    """Return the first tasks of a stream."""
    module = registry.load_module(streams.sources, stream.source)
    settings = replace(module.Settings(), **stream.options)
    return [module.make_task(settings, seed, t) for t in range(rounds)]


def run_entry(entry: Entry, work: Path) -> Row:
    """Play one run and return its row; one that was finished before is read and not run again."""
    asked = entry._asdict()
    kept = work / f"{'-'.join(map(str, entry))}.json"
    if before := read_kept(kept, asked):
        return before
    tasks, settings = make_tasks(STREAMS[entry.stream], entry.seed, entry.rounds), settings_of(entry.label, entry.seed)
    name = MIXTURE if entry.label == "mixture" else LEARNER
    losses, components, seconds = [], [], 0.0
    for learner, score, spent in play_stream(settings, name, tasks, work / "programs"):
        losses.append(score.loss_after)
        components.append(sum(count > 0 for count in getattr(learner, "counts", ())))
        seconds += spent
    return keep(kept, {"asked": asked, "losses": losses, "components": components, "seconds": seconds})


def by_run(rows: Sequence[Row]) -> dict[tuple[str, str], list[Row]]:
    """Return the rows of each stream and label, the seeds in order."""
    found: dict[tuple[str, str], list[Row]] = {(s, label): [] for s in STREAMS for label in LABELS}
    for row in rows:
        found[row["asked"]["stream"], row["asked"]["label"]].append(row)
    return {key: sorted(some, key=lambda row: int(row["asked"]["seed"])) for key, some in found.items() if some}


def render(result: dict[str, Any]) -> str:
    """Return the table as Markdown: means over the seeds and their standard errors."""
    text = [
        "# Streams that are not stationary",
        "",
        f"`{result['command']}`, commit {result['commit']}.",
        "",
        f"Query loss after adaptation, scored before learning, of {result['iterations']} rounds: mean over the seeds ±",
        "standard error. FTML by each replay policy, and the Dirichlet-process mixture (uniform replay). *Against*",
        "*uniform* is the difference of cumulative losses seed by seed, below 0 is better. Seconds are processor time.",
        "",
        "| stream | learner | seeds | cumulative loss | against uniform | loss, last half | components | seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    groups = by_run(result["rows"])
    for (stream, label), rows in groups.items():
        even = {row["asked"]["seed"]: sum(row["losses"]) for row in groups.get((stream, "uniform"), [])}
        against = [sum(row["losses"]) - even[row["asked"]["seed"]] for row in rows if row["asked"]["seed"] in even]
        cells = [
            str(len(rows)),
            _spread([sum(row["losses"]) for row in rows]),
            _spread(against) if label != "uniform" else "",
            _spread([mean(row["losses"][len(row["losses"]) // 2 :]) for row in rows]),
            _spread([row["components"][-1] for row in rows]) if label == "mixture" else "",
            _spread([row["seconds"] for row in rows]),
        ]
        text.append(f"| {stream} | {label} | {' | '.join(cells)} |")
    return "\n".join([*text, "", f"![losses over the rounds]({NAME}.png)", ""])


def _spread(values: Sequence[float]) -> str:
    return tell_mean(values, ".2f", none="")


def plot(rows: Sequence[Row]) -> bytes:
    """Return a PNG: for each stream, how far each learner's cumulative loss is ahead of uniform replay's."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.2), dpi=110, layout="constrained")
    groups = by_run(rows)
    for axes, stream in zip(figure.subplots(1, len(STREAMS)), STREAMS, strict=True):
        for label, colour in zip(LABELS, COLOURS, strict=True):
            if (stream, label) in groups and (stream, "uniform") in groups:
                mine, even = (
                    np.mean([np.cumsum(row["losses"]) for row in groups[stream, name]], 0)
                    for name in (label, "uniform")
                )
                axes.plot(mine - even, color=colour, label=label)
        axes.set_title(stream, fontsize=11)
        axes.set_xlabel("round")
        tidy(axes)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=9)
    figure.axes[0].set_ylabel("cumulative loss minus that of uniform replay")
    return as_png(figure)


@click.command()
@run_options(NAME, rounds=100)
def main(rounds: int, seeds: int, only: tuple[str, ...], jobs: int, work: Path, out: Path) -> None:
    """Write non_stationary.json, .md and .png into OUT; runs that are finished in WORK are not made again."""
    labels = choose_labels(only, LABELS)
    (work / "programs").mkdir(parents=True, exist_ok=True)
    asked = [
        (Entry(stream, label, rounds, seed), work) for seed in range(seeds) for label in labels for stream in STREAMS
    ]
    run_rows(jobs, run_entry, asked, lambda rows: _write(out, rounds, rows))
    click.echo((out / f"{NAME}.md").read_text(encoding="utf-8"))


def _write(out: Path, rounds: int, rows: list[Row]) -> None:
    rounded = [{**row, "losses": [float(f"{loss:.6g}") for loss in row["losses"]]} for row in rows]
    write_table(out, NAME, rounds, rounded, render, plot(rows))


if __name__ == "__main__":
    main()
