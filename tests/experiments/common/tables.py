"""Run the rows of a table in parallel, save each finished row, and write the table after each row."""

import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import click
from rich.progress import Progress
from streams.atomic_files import replace_file

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]
Row = dict[str, Any]
"""A row of a table: the requested configuration under ``asked``, and the results."""

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""The colours of lines in pictures (Okabe and Ito, 2008)."""


def choose_labels(only: Sequence[str], labels: Sequence[str]) -> list[str]:
    """Return the ``labels`` that are in ``only``, or all if it is empty; raises ``click.BadParameter`` for others."""
    if unknown := set(only) - set(labels):
        raise click.BadParameter(f"{', '.join(sorted(unknown))}: the labels are {', '.join(labels)}")
    return [label for label in labels if not only or label in only]


def load_row(file: Path, asked: Row) -> Row | None:
    """Return the row in ``file`` if its configuration equals ``asked``."""
    if file.exists() and (before := json.loads(file.read_text()))["asked"] == json.loads(json.dumps(asked)):
        return dict(before)
    return None


def save_row(file: Path, row: Row) -> Row:
    """Save a finished row, and return it as ``load_row`` will."""
    text = json.dumps(row, indent=1)
    file.parent.mkdir(parents=True, exist_ok=True)
    replace_file(file, text.encode(), durable=False)
    return dict(json.loads(text))


def run_rows(jobs: int, run: Callable[..., Row], asked: Sequence[tuple[Any, ...]], write: Callable[..., None]) -> None:
    """Call ``run(*arguments)`` for each of ``asked``, ``jobs`` in parallel; ``write`` all finished rows after each."""
    rows: dict[int, Row] = {}
    with Progress() as progress, ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        bar = progress.add_task("rows", total=len(asked))
        run = _find_importable(run)
        places = {pool.submit(run, *arguments): place for place, arguments in enumerate(asked)}
        try:
            for future in as_completed(places):
                rows[places[future]] = future.result()
                progress.advance(bar)
                write([rows[place] for place in sorted(rows)])
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # Or the error would wait for all rows.
            raise


def _find_importable(run: Callable[..., Row]) -> Callable[..., Row]:
    """Return the same function of a module that other processes can import, if it is of a package's ``__main__``."""
    spec = sys.modules["__main__"].__spec__
    if run.__module__ != "__main__" or spec is None:
        return run
    found: Callable[..., Row] = getattr(import_module(spec.name), run.__name__)
    return found


def read_command(module: str) -> str:
    """Return the command line of this process, which runs ``module``."""
    return " ".join(["python -m", module, *sys.argv[1:]])


def read_commit() -> str:
    """Return the short hash of the checked-out commit."""
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"


def write_table(
    out: Path,
    name: str,
    module: str,
    iterations: int,
    rows: list[Row],
    render: Callable[[Row], str],
    picture: bytes | None = None,
) -> None:
    """Write a table of ``rows`` with the command of ``module`` and the commit, using ``write_files``."""
    result = {"command": read_command(module), "commit": read_commit(), "iterations": iterations, "rows": rows}
    write_files(out, name, result, render(result), picture)


def write_files(out: Path, name: str, result: Row, text: str, picture: bytes | None = None) -> None:
    """Write a table as ``name``.json and ``name``.md, and ``picture``, if it is given, as ``name``.png."""
    out.mkdir(parents=True, exist_ok=True)
    replace_file(out / f"{name}.json", json.dumps(result, indent=1).encode(), durable=False)
    replace_file(out / f"{name}.md", text.encode(), durable=False)
    if picture is not None:
        replace_file(out / f"{name}.png", picture, durable=False)


def mean_and_error(values: Sequence[float]) -> dict[str, float | int | None]:
    """Return the mean of ``values``, its standard error (None for fewer than two values) and their number."""
    count = len(values)
    mean = sum(values) / count if count else None
    if mean is None or count < 2:
        return {"mean": mean, "error": None, "count": count}
    variance = sum((value - mean) ** 2 for value in values) / (count - 1)
    return {"mean": mean, "error": math.sqrt(variance / count), "count": count}


def format_spread(found: dict[str, Any], form: str) -> str:
    """Format a result of ``mean_and_error`` as "mean ± error" with the format ``form``; "-" without values."""
    if found["mean"] is None:
        return "-"
    error = "" if found["error"] is None else f" ± {found['error']:{form.lstrip('+,')}}"
    return f"{found['mean']:{form}}{error}"


def format_mean(values: Iterable[float], form: str, none: str = "-") -> str:
    """Format the mean of ``values`` and its standard error with ``format_spread``; ``none`` without values."""
    found = [*values]
    return format_spread(mean_and_error(found), form) if found else none


def run_options(name: str, rounds: int, *, jobs: int = 2, about: str = "Rounds of each run.") -> Decorator:
    """Return a decorator that adds the options of a command that runs learners for several seeds."""
    work = Path(f"runs/experiments/{name}")
    options = (
        click.option("--rounds", default=rounds, show_default=True, help=about),
        click.option("--seeds", default=3, show_default=True, help="Number of seeds, starting at 0."),
        click.option("--only", multiple=True, metavar="LABEL", help="A learner; may be repeated. All by default."),
        click.option("--jobs", default=jobs, show_default=True, help="Number of parallel runs."),
        click.option("--work", type=click.Path(path_type=Path), default=work, show_default=True),
        click.option("--out", type=click.Path(path_type=Path), default=Path("docs/results"), show_default=True),
    )

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate
