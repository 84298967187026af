"""Plan and run the trainings of the table of letters, which other processes may do."""

import dataclasses
import hashlib
import json
import time
from pathlib import Path
from typing import Any

import click
import torch
from tests.experiments.common.tables import Row, load_row, read_commit, save_row
from tests.experiments.glyphs.fonts import find_fonts
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


def require_fonts(fonts: Path | None) -> Path:
    """Return the folder with the fonts; raises ``click.UsageError`` without them."""
    try:
        return find_fonts(fonts)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
