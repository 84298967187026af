"""Run five-way classification of letters of unseen scripts, with every algorithm and with embedding baselines."""

import dataclasses
import hashlib
import json
import time
from pathlib import Path
from typing import Any

import click
import torch
from tests.experiments.common.tables import (
    Row,
    choose_labels,
    load_row,
    read_command,
    read_commit,
    run_rows,
    save_row,
    write_files,
)
from tests.experiments.glyphs.fonts import find_fonts
from tests.experiments.glyphs.page import NAME, render, sort_rows
from tests.experiments.glyphs.rows import list_plans
from tests.experiments.glyphs.tasks import load_letters
from tests.experiments.glyphs.training import Budget, Job, train_and_score

TEST_TASKS = 600


def plan_jobs(names: list[str], shots: tuple[int, ...], budget: Budget, seed: int) -> list[Job]:
    """Return a job for each training: one for all ``shots`` if they share it, or one for each of them."""
    jobs = []
    for name, plan in list_plans().items():
        if name not in names:
            continue
        shared = plan.algorithm is None or plan.training.shots is not None
        steps = 8 * budget.steps if plan.algorithm is None else budget.steps
        scored = [shots] if shared else [(shot,) for shot in shots]
        jobs += [Job(name, plan, some, Budget(budget.minutes, steps), seed, TEST_TASKS) for some in scored]
    return jobs


def run_job(job: Job, work: Path, fonts: Path, validation: bool = False) -> Row:
    """Return the rows of a job, loaded if the same job is finished; ``validation`` replaces the test scripts."""
    asked = {**describe_job(job), "validation": validation}
    name = "".join(letter if letter.isalnum() else "_" for letter in job.name.lower())
    digest = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()
    file = work / f"{name}-{digest[:12]}.json"
    if before := load_row(file, asked):
        return before
    torch.set_num_threads(1)
    began = time.monotonic()
    letters = load_letters(fonts, work / "letters.safetensors", validation)
    rows = train_and_score(job, letters)
    about = {
        "scripts": [letters.train_scripts, letters.test_scripts],
        "letters": [len(letters.train), len(letters.test)],
        "commit": read_commit(),
        "seconds": time.monotonic() - began,
    }
    return save_row(file, {"asked": asked, "rows": [{"asked": asked, **row, **about} for row in rows]})


def describe_job(job: Job) -> dict[str, Any]:
    """Return the settings of a job as JSON has them."""
    algorithm, training = job.plan
    settings = {} if algorithm is None else dataclasses.asdict(algorithm)
    budget = {"minutes": job.budget.minutes} if job.budget.minutes else {"iterations": job.budget.steps}
    rest = {"shots": [*job.shots], "seed": job.seed, "tasks": job.tasks}
    return {**settings, "training": dataclasses.asdict(training), **budget, **rest}


def write_rows(out: Path, rows: list[Row]) -> None:
    """Write the table: ``rows`` replace those of the same label and shots that OUT has, and the others stay."""
    file = out / f"{NAME}.json"
    before = json.loads(file.read_text(encoding="utf-8"))["rows"] if file.exists() else []
    known = {(row["label"], row["shots"]): row for row in [*before, *rows]}
    result = {"command": read_command(__package__), "rows": sort_rows([*known.values()])}
    write_files(out, NAME, result, render(result))


@click.command()
@click.option("--minutes", type=float, help="Processor time of each training. By default, steps are counted.")
@click.option("--iterations", default=300, show_default=True, help="Meta-steps of each training without --minutes.")
@click.option("--only", multiple=True, metavar="NAME", help="What to train; may be repeated. All by default.")
@click.option("--shots", multiple=True, type=int, default=(1, 5), show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--jobs", default=2, show_default=True, help="Number of parallel trainings.")
@click.option(
    "--fonts",
    type=click.Path(path_type=Path),
    help="A folder with the Noto fonts, instead of the one that make creates.",
)
@click.option("--work", type=click.Path(path_type=Path), default=Path("runs/experiments/glyphs"), show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=Path("docs/results"), show_default=True)
def main(
    minutes: float | None,
    iterations: int,
    only: tuple[str, ...],
    shots: tuple[int, ...],
    seed: int,
    jobs: int,
    fonts: Path | None,
    work: Path,
    out: Path,
) -> None:
    """Write glyph_table.json and .md into OUT; trainings that are finished in WORK are reused.

    Rows of OUT that are not computed again stay as they are.
    """
    names = choose_labels(only, [*list_plans()])
    place = require_fonts(fonts)
    load_letters(place, work / "letters.safetensors")
    asked = [(job, work, place) for job in plan_jobs(names, shots, Budget(minutes, iterations), seed)]
    run_rows(jobs, run_job, asked, lambda done: write_rows(out, [row for job in done for row in job["rows"]]))
    click.echo((out / f"{NAME}.md").read_text(encoding="utf-8"))


def require_fonts(fonts: Path | None) -> Path:
    """Return the folder with the fonts; raises ``click.UsageError`` without them."""
    try:
        return find_fonts(fonts)
    except ValueError as error:
        raise click.UsageError(str(error)) from error


if __name__ == "__main__":
    main()
