"""What the tables of algorithms share: rows run side by side, kept when finished, written as they come."""

import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import click
from rich.progress import Progress
from streams.atomic_files import replace_file

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]
Row = dict[str, Any]
"""A row of a table: what was asked for, under ``asked``, and what came of it."""


def choose_labels(only: Sequence[str], labels: Sequence[str]) -> list[str]:
    """Return those of ``labels`` that are asked for, all by default; raises ``click.BadParameter`` for others."""
    if unknown := set(only) - set(labels):
        raise click.BadParameter(f"{', '.join(sorted(unknown))}: the labels are {', '.join(labels)}")
    return [label for label in labels if not only or label in only]


def read_kept(file: Path, asked: Row) -> Row | None:
    """Return the row that ``file`` keeps, if it was made as it is ``asked`` for now."""
    if file.exists() and (before := json.loads(file.read_text()))["asked"] == json.loads(json.dumps(asked)):
        return dict(before)
    return None


def keep(file: Path, row: Row) -> Row:
    """Keep a finished row, and return it as it will be read."""
    text = json.dumps(row, indent=1)
    replace_file(file, text.encode(), durable=False)
    return dict(json.loads(text))


def run_rows(jobs: int, run: Callable[..., Row], asked: Sequence[tuple[Any, ...]], write: Callable[..., None]) -> None:
    """Call ``run(*arguments)`` for each of ``asked``, ``jobs`` at once; ``write`` the rows that there are, in order."""
    rows: dict[int, Row] = {}
    with Progress() as progress, ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        bar = progress.add_task("rows", total=len(asked))
        places = {pool.submit(run, *arguments): place for place, arguments in enumerate(asked)}
        for future in as_completed(places):
            rows[places[future]] = future.result()
            progress.advance(bar)
            write([rows[place] for place in sorted(rows)])


def commit() -> str:
    """Return what the work tree is at, for tables to say."""
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"


def write_table(
    out: Path,
    name: str,
    iterations: int,
    rows: list[Row],
    render: Callable[[Row], str],
    picture: bytes | None = None,
) -> None:
    """Write a table of ``rows``, and what it was made by, as ``write_files`` does."""
    command = " ".join([f"python -m tests.experiments.{name}", *sys.argv[1:]])
    result = {"command": command, "commit": commit(), "iterations": iterations, "rows": rows}
    write_files(out, name, result, render(result), picture)


def write_files(out: Path, name: str, result: Row, text: str, picture: bytes | None = None) -> None:
    """Write a table as ``name``.json and ``name``.md, and a ``picture``, if there is a new one, as ``name``.png."""
    out.mkdir(parents=True, exist_ok=True)
    replace_file(out / f"{name}.json", json.dumps(result, indent=1).encode(), durable=False)
    replace_file(out / f"{name}.md", text.encode(), durable=False)
    if picture is not None:
        replace_file(out / f"{name}.png", picture, durable=False)


def spread(values: Sequence[float]) -> dict[str, float | int | None]:
    """Return the mean, its standard error (None for fewer than two values) and the number of some values."""
    count = len(values)
    mean = sum(values) / count if count else None
    if mean is None or count < 2:
        return {"mean": mean, "error": None, "count": count}
    variance = sum((value - mean) ** 2 for value in values) / (count - 1)
    return {"mean": mean, "error": math.sqrt(variance / count), "count": count}


def tell_spread(found: dict[str, Any], form: str) -> str:
    """Return what ``spread`` found as "mean ± error", the mean in the ``form``; "-" where there is no value."""
    if found["mean"] is None:
        return "-"
    error = "" if found["error"] is None else f" ± {found['error']:{form.lstrip('+,')}}"
    return f"{found['mean']:{form}}{error}"


def tell_mean(values: Iterable[float], form: str, none: str = "-") -> str:
    """Return the mean of some values and its standard error, as ``tell_spread`` does; ``none`` where there is none."""
    found = [*values]
    return tell_spread(spread(found), form) if found else none


def run_options(name: str, rounds: int, *, jobs: int = 2, about: str = "Rounds of each run.") -> Decorator:
    """Return the options of a command that plays learners for several seeds, with their defaults."""
    work = Path(f"runs/experiments/{name}")
    options = (
        click.option("--rounds", default=rounds, show_default=True, help=about),
        click.option("--seeds", default=3, show_default=True, help="How many seeds, from 0."),
        click.option("--only", multiple=True, metavar="LABEL", help="A learner; again for more. All by default."),
        click.option("--jobs", default=jobs, show_default=True, help="How many runs at once."),
        click.option("--work", type=click.Path(path_type=Path), default=work, show_default=True),
        click.option("--out", type=click.Path(path_type=Path), default=Path("docs/results"), show_default=True),
    )

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate
