"""Try settings for the table of letters on validation scripts, with short trainings."""

from pathlib import Path
from typing import Any

import click
from tests.experiments.common.tables import Row, choose_labels, read_command, read_commit, run_rows, write_files
from tests.experiments.glyphs.__main__ import require_fonts, run_job
from tests.experiments.glyphs.page import describe_inner_loop, describe_training
from tests.experiments.glyphs.rows import EMBEDDING, change, list_plans
from tests.experiments.glyphs.tasks import load_letters
from tests.experiments.glyphs.training import Budget, Job

NAME = "glyph_tuning"
TASKS = 200

MANY = {"shots": 1, "ways": 20, "queries": 3, "meta_lr": 3e-3}
MORE = {"shots": 1, "ways": 60, "queries": 2, "meta_lr": 3e-3}
NEAR = {"learned": {"log_scale": -3.0}}
"""Distances of untrained features are large, so the softmax of them starts flatter than the rule has it."""

CANDIDATES: dict[str, tuple[dict[str, Any], ...]] = {
    EMBEDDING: ({}, {"filters": 64, "rate": 1e-3}, {"pool": "max", "rate": 2e-3}),
    "nearest centroid": (
        {"shots": 1, "batch": 4, "how": "traced", "meta_lr": 3e-3, **NEAR},
        {**MANY, **NEAR},
        {**MORE, **NEAR},
        {**MORE, **NEAR, "pool": "max"},
    ),
    "ridge regression": (MANY, MORE, {**MORE, "pool": "max"}),
    "logistic regression": ({"shots": 1, "meta_lr": 3e-3}, {**MANY, "batch": 1, "how": "loop"}),
    "inner momentum": (
        {"shots": 1, "anneal": True},
        {"shots": 1, "anneal": True, "lr": 0.4},
        {"shots": 1, "anneal": True, "meta_lr": 6e-3},
    ),
}
"""Settings that are tried, by what is trained. Meta-trainings have one support image, and serve both columns."""


def plan_trials(names: list[str], shots: tuple[int, ...], minutes: float, seed: int) -> list[Job]:
    """Return a job for each candidate, whose training serves all ``shots`` that are scored."""
    plans, jobs = list_plans(), []
    for name, candidates in CANDIDATES.items():
        for settings in candidates if name in names else ():
            plan = change(plans[name], settings)
            jobs.append(Job(name, plan, shots, Budget(minutes, 0), seed, TASKS))
    return jobs


def render(result: dict[str, Any]) -> str:
    """Return what was tried as Markdown, a row for each candidate and head."""
    rows = result["rows"]
    (train_scripts, scripts), (train, letters) = rows[0]["scripts"], rows[0]["letters"]
    about = f"""# Settings for letters of unseen scripts, on validation scripts

`{result["command"]}`, commit {result["commit"]}.

What was tried for [the table of letters](glyph_table.md). Of its training scripts, {train_scripts} with {train:,}
letters are for training here, and {scripts} with {letters:,} letters for validation; its test scripts are not used.
Each training has {result["minutes"]:g} minutes of processor time. Accuracy over {TASKS} validation tasks with its 95 %
interval over the tasks, which are the same for all rows.

| what | inner loop | training | steps | 1-shot | 5-shot |
|---|---|---|---|---|---|
"""
    return about + "".join(f"| {' | '.join(cells)} |\n" for cells in _list_cells(rows))


def _list_cells(rows: list[Row]) -> list[list[str]]:
    found: dict[tuple[str, ...], dict[int, str]] = {}
    for row in rows:
        asked = row["asked"]
        key = (row["label"], describe_inner_loop(asked), describe_training(asked), f"{row['steps']:,}")
        found.setdefault(key, {})[row["shots"]] = f"{row['accuracy']:.1%} ± {row['interval']:.1%}"
    return [[*key, by_shots.get(1, ""), by_shots.get(5, "")] for key, by_shots in found.items()]


@click.command()
@click.option("--minutes", default=1.0, show_default=True, help="Processor time of each training.")
@click.option("--only", multiple=True, metavar="NAME", help="What to train; may be repeated. All by default.")
@click.option("--shots", multiple=True, type=int, default=(1, 5), show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--jobs", default=2, show_default=True, help="Number of parallel trainings.")
@click.option("--fonts", type=click.Path(path_type=Path), help="A folder with the Noto fonts.")
@click.option("--work", type=click.Path(path_type=Path), default=Path("runs/experiments/glyphs"), show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=Path("docs/results"), show_default=True)
def main(
    minutes: float,
    only: tuple[str, ...],
    shots: tuple[int, ...],
    seed: int,
    jobs: int,
    fonts: Path | None,
    work: Path,
    out: Path,
) -> None:
    """Write glyph_tuning.json and .md into OUT; trainings that are finished in WORK are reused."""
    place = require_fonts(fonts)
    load_letters(place, work / "letters.safetensors")
    trials = [(job, work, place, True) for job in plan_trials(choose_labels(only, [*CANDIDATES]), shots, minutes, seed)]

    def write(done: list[Row]) -> None:
        rows = [row for job in done for row in job["rows"]]
        result = {
            "command": read_command(f"{__package__}.tuning"),
            "commit": read_commit(),
            "minutes": minutes,
            "rows": rows,
        }
        write_files(out, NAME, result, render(result))

    run_rows(jobs, run_job, trials, write)
    click.echo((out / f"{NAME}.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
