"""Try settings for the table of letters on validation scripts, with short trainings."""

import json
from pathlib import Path
from typing import Any

import click
from tests.experiments.common.tables import Row, choose_labels, read_command, run_rows, write_files
from tests.experiments.glyphs.embedding import EMBEDDINGS
from tests.experiments.glyphs.jobs import require_fonts, run_job
from tests.experiments.glyphs.page import describe_inner_loop, describe_training
from tests.experiments.glyphs.rows import EMBEDDING, change, list_untuned_plans
from tests.experiments.glyphs.tasks import load_letters
from tests.experiments.glyphs.training import Budget, Job

NAME = "glyph_tuning"
TASKS = 200

MANY = {"filters": 64, "shots": 1, "ways": 20, "queries": 3}
MORE = {**MANY, "ways": 60, "queries": 2}
FLAT = {"learned": {"log_scale": -3.0}}
"""Distances of untrained features are large, so the softmax of them starts flatter than by default."""

CANDIDATES: dict[str, tuple[dict[str, Any], ...]] = {
    EMBEDDING: (
        {},
        {"filters": 64},
        {"filters": 64, "rate": 1e-3},
        {"filters": 64, "turns": 4},
        {"pool": "max"},
    ),
    "nearest centroid": (
        {**MANY, **FLAT},
        {**MANY, **FLAT, "turns": 4},
        {**MANY, **FLAT, "meta_lr": 3e-3},
        {**MORE, **FLAT, "meta_lr": 3e-3},
    ),
    "ridge regression": ({**MANY, "meta_lr": 3e-3}, {**MORE, "meta_lr": 3e-3}),
    "logistic regression": ({**MANY, "meta_lr": 3e-3, "batch": 1, "how": "loop"},),
}
"""Settings that are tried, by what is trained. Meta-trainings have one support image, and serve both columns."""


def plan_trials(names: list[str], shots: tuple[int, ...], minutes: float, seed: int) -> list[Job]:
    """Return a job for each candidate, whose training serves all ``shots`` that are scored."""
    plans, jobs = list_untuned_plans(), []
    for name, candidates in CANDIDATES.items():
        for settings in candidates if name in names else ():
            plan = change(plans[name], settings)
            jobs.append(Job(name, plan, shots, Budget(minutes, 0), seed, TASKS))
    return jobs


def render(result: dict[str, Any]) -> str:
    """Return what was tried as Markdown, a row for each candidate and head."""
    rows = result["rows"]
    (train_scripts, scripts), (train, letters) = rows[0]["scripts"], rows[0]["letters"]
    fewest, most = (choose(row["asked"]["tasks"] for row in rows) for choose in (min, max))
    about = f"""# Settings for letters of unseen scripts, on validation scripts

`{result["command"]}` made the newest rows.

What was tried for [the table of letters](glyph_table.md). Of its training scripts, {train_scripts} with {train:,}
letters are for training here, and {scripts} with {letters:,} letters for validation; its test scripts are not used.
*Minutes* are processor time of the training; how many steps they give depends on what else the machine does. Accuracy
over {fewest} to {most} validation tasks, of which the first are the same for all rows, with its 95 % interval over the
tasks where it was saved.

| what | inner loop | training | minutes | steps | 1-shot | 5-shot |
|---|---|---|---|---|---|---|
"""
    return about + "".join(f"| {' | '.join(cells)} |\n" for cells in _list_cells(rows))


def _list_cells(rows: list[Row]) -> list[list[str]]:
    found: dict[tuple[str, ...], dict[int, str]] = {}
    for row in rows:
        asked = row["asked"]
        cost = (f"{asked['minutes']:g}", f"{row['steps']:,}")
        key = (row["label"], describe_inner_loop(asked), describe_training(asked), *cost)
        spread = "" if row["interval"] is None else f" ± {row['interval']:.1%}"
        found.setdefault(key, {})[row["shots"]] = f"{row['accuracy']:.1%}{spread}"
    return [[*key, by_shots.get(1, ""), by_shots.get(5, "")] for key, by_shots in found.items()]


def write_rows(out: Path, rows: list[Row]) -> None:
    """Write the page: ``rows`` replace those of OUT that asked for the same, and the others stay."""
    file = out / f"{NAME}.json"
    before = json.loads(file.read_text(encoding="utf-8"))["rows"] if file.exists() else []
    known = {json.dumps([row["label"], row["shots"], row["asked"]], sort_keys=True): row for row in [*before, *rows]}
    order = [*EMBEDDINGS, *CANDIDATES]
    sorted_rows = sorted(known.values(), key=lambda row: order.index(row["label"]))
    result = {"command": read_command(f"{__package__}.tuning"), "rows": sorted_rows}
    write_files(out, NAME, result, render(result))


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
    """Write glyph_tuning.json and .md into OUT; trainings that are finished in WORK are reused.

    Rows of OUT with other settings or budgets stay as they are.
    """
    place = require_fonts(fonts)
    load_letters(place, work / "letters.safetensors")
    trials = [(job, work, place, True) for job in plan_trials(choose_labels(only, [*CANDIDATES]), shots, minutes, seed)]

    run_rows(jobs, run_job, trials, lambda done: write_rows(out, [row for job in done for row in job["rows"]]))
    click.echo((out / f"{NAME}.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
