"""Measure what a round costs with the default pool, next to a round of FTML alone, in CPU seconds."""

from collections.abc import Sequence
from importlib.resources import files as package_files
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import click
from deploy.config.config import read_config
from online_meta.types import Task
from streams.sources import sinusoid
from trainers.settings import TrainerSettings

from tests.benchmarks.works import image_task
from tests.experiments.common.tables import Row, format_mean, load_row, save_row, write_table
from tests.experiments.pool.runs import Play, play
from tests.experiments.pool.streams import DEFAULTS

NAME = "pool_cost"
ALONE, POOLED = "FTML alone", "default pool"
WARM_UP = 2
"""Rounds that do not count: programs are recorded in them."""
SIDE, SHOTS, QUERIES = 28, 1, 15
"""Images of a task of Conv4: pixels a side, support and query images of a class."""
POINTS = 10
"""Support and query points of a sinusoid."""


class Work(NamedTuple):
    """What is measured.

    Attributes:
        title: on the page.
        file: the configuration, in the package ``deploy``.
        overrides: what is changed in it, so that it plays what plays by default, with default options.
        ways: the classes of a task of images; 0 for sinusoids.
        rounds: rounds of a run.
        most: how many times the cost of FTML alone is the goal.
    """

    title: str
    file: str
    overrides: tuple[str, ...]
    ways: int
    rounds: int
    most: float

    def make(self) -> list[Task]:
        """Return the tasks of a run."""
        if self.ways:
            return [image_task(self.ways, SHOTS, QUERIES, seed, SIDE) for seed in range(self.rounds)]
        return [sinusoid.make_task(0, t, POINTS, POINTS) for t in range(self.rounds)]


WORKS = {
    "conv4": Work(
        "Conv4, 5-way 1-shot, 15 queries a class",
        "demo.toml",
        (
            *("regret.options={}", "regret.comparator=[]", "task.ways=5", "inner.steps=5", "inner.lr=0.1"),
            "model.args={ channels = 3, size = 28, ways = 5 }",
        ),
        5,
        6,
        1.3,
    ),
    "sinusoid": Work(
        "Perceptron 1-40-40-1 on sinusoids",
        "sinusoid.toml",
        (
            *("regret.comparator=[]", f"regret.baselines={[*DEFAULTS[1:]]}"),
            "regret.options={ from_scratch = { steps = 50, lr = 0.01 } }",
        ),
        0,
        18,
        3.0,
    ),
}
LONE = ("regret.baselines=[]", "regret.options={}")


def make_settings(work: Work, kind: str) -> TrainerSettings:
    """Return the settings of a run of a ``kind``, with recorded programs."""
    overrides = (*work.overrides, "engine.batching=traced", *(LONE if kind == ALONE else ()))
    return read_config(Path(str(package_files("deploy"))) / work.file, overrides).trainer()


def measure(name: str, kind: str, run: int, folder: Path) -> Row:
    """Return the CPU seconds of the rounds of a run, by learner; a saved row is loaded instead of measured."""
    work = WORKS[name]
    settings = make_settings(work, kind)
    asked = {"work": name, "kind": kind, "run": run, "rounds": work.rounds, "settings": repr(settings)}
    file = folder / f"{name}-{kind.replace(' ', '_')}-{run}.json"
    if before := load_row(file, asked):
        return before
    spent: list[dict[str, float]] = []
    programs = folder / "programs"
    programs.mkdir(parents=True, exist_ok=True)

    def note(round: int, played: Play) -> None:
        spent.append(dict(played.seconds))

    play(settings, work.make(), programs, on_round=note)
    taken = [
        {name: after[name] - before[name] for name in after}
        for before, after in zip(spent[WARM_UP:], spent[WARM_UP + 1 :], strict=False)
    ]
    seconds = {name: median(each[name] for each in taken) for name in taken[0]}
    row = {"asked": asked, "round": median(sum(each.values()) for each in taken), "seconds": seconds}
    return save_row(file, row)


def render(result: dict[str, Any]) -> str:
    """Return the page as Markdown."""
    text = [
        "# What a round costs with the pool",
        "",
        f"`{result['command']}`, commit {result['commit']}.",
        "",
        "CPU milliseconds of scoring and learning in a round: the median over the rounds of a run, after the first",
        f"{WARM_UP}; mean over the runs ± standard error. Runs of both kinds take turns. *{ALONE}* has no other",
        f"learner and no other number of inner steps. *{POOLED}* is what a configuration without `[[learner]]` plays:",
        "all learners by default, after 0 to 20 inner steps, and the pool.",
        "",
        "| network | runs | FTML alone, ms | default pool, ms | times FTML alone | at most | |",
        "|---|---|---|---|---|---|---|",
    ]
    groups = _group(result["rows"])
    for name, kinds in groups.items():
        work, (alone, pooled) = WORKS[name], (kinds[ALONE], kinds[POOLED])
        ratios = [two["round"] / one["round"] for one, two in zip(alone, pooled, strict=False)]
        verdict = "holds" if sum(ratios) / len(ratios) <= work.most else "**falls short**"
        cells = [work.title, str(len(ratios)), *(_format(rows) for rows in (alone, pooled))]
        text.append(f"| {' | '.join([*cells, format_mean(ratios, '.2f'), f'{work.most:g}', verdict])} |")
    for name, kinds in groups.items():
        lone = sum(row["round"] for row in kinds[ALONE]) / len(kinds[ALONE])
        text += [
            "",
            f"## {WORKS[name].title}: by learner",
            "",
            "| learner | ms a round | times FTML alone |",
            "|---|---|---|",
        ]
        for learner in kinds[POOLED][0]["seconds"]:
            values = [row["seconds"][learner] for row in kinds[POOLED]]
            cells = [learner, format_mean([1000 * one for one in values], ".2f")]
            text.append(f"| {' | '.join(cells)} | {format_mean([one / lone for one in values], '.2f')} |")
    return "\n".join([*text, ""])


def _group(rows: Sequence[Row]) -> dict[str, dict[str, list[Row]]]:
    found: dict[str, dict[str, list[Row]]] = {}
    for row in rows:
        found.setdefault(row["asked"]["work"], {}).setdefault(row["asked"]["kind"], []).append(row)
    return {name: kinds for name, kinds in found.items() if len(kinds) == 2}


def _format(rows: list[Row]) -> str:
    return format_mean([1000 * row["round"] for row in rows], ".1f")


@click.command()
@click.option("--runs", default=5, show_default=True, help="Runs of each kind.")
@click.option("--work", type=click.Path(path_type=Path), default=Path(f"runs/experiments/{NAME}"), show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=Path("docs/results"), show_default=True)
def main(runs: int, work: Path, out: Path) -> None:
    """Write pool_cost.json and .md into OUT; runs that are finished in WORK are reused."""
    rows = []
    for run, name, kind in product(range(runs), WORKS, (ALONE, POOLED)):
        row = measure(name, kind, run, work)
        rows.append({**row, "asked": {**row["asked"], "settings": ""}})
        write_table(out, NAME, f"tests.experiments.{NAME}", runs, rows, render)
    click.echo((out / f"{NAME}.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
