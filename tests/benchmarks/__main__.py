"""``python -m tests.benchmarks``: measure, and write bench.json, bench.md and bench.png after each part."""

import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import torch

from streams.atomic_files import replace_file
from tests.benchmarks.contestants import PACKAGES
from tests.benchmarks.growth import measure_growth
from tests.benchmarks.plot import draw
from tests.benchmarks.race import race
from tests.benchmarks.starts import time_first_start, time_imports
from tests.benchmarks.surroundings import bind_to_one_core, describe_machine, log_progress, read_commit, read_versions
from tests.benchmarks.table import render
from tests.benchmarks.works import WORKS

PARTS = ("first_start", *WORKS, "memory_growth")


def measure(chosen: tuple[str, ...], rounds: int | None, programs: Path) -> Iterator[dict[str, Any]]:
    """Yield the result after each part that is measured."""
    began = time.monotonic()
    about: dict[str, Any] = {
        "command": " ".join(["python -m tests.benchmarks", *sys.argv[1:]]),
        "commit": read_commit(),
    }
    about |= {"machine": describe_machine(), "versions": read_versions(), "plot": "bench.png", "wall_seconds": 0.0}
    result: dict[str, Any] = {"about": about, "works": {}}
    log_progress("imports")
    result["imports"] = time_imports(["online_meta", *PACKAGES.values()])
    if "first_start" in chosen:
        log_progress("first start to first step")
        result["first_start"] = time_first_start()
    bind_to_one_core()
    torch.set_num_threads(1)
    for name in (name for name in chosen if name in WORKS):
        work = WORKS[name]
        result["works"][name] = race(
            work, rounds or work.rounds, programs, lambda what, at=name: log_progress(f"{at}: {what}")
        )
        about["wall_seconds"] = time.monotonic() - began
        yield result
    if "memory_growth" in chosen:
        result["growth"] = measure_growth(programs, lambda what: log_progress(f"memory_growth: {what}"))
    about["wall_seconds"] = time.monotonic() - began
    yield result


@click.command()
@click.option("--only", type=click.Choice(PARTS), multiple=True, help="A part; may be repeated. All by default.")
@click.option(
    "--rounds", type=click.IntRange(1), help="Rounds of each race; by default 2 to 15, depending on the race."
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="The output folder; by default docs/results, or runs/bench with --only.",
)
def main(only: tuple[str, ...], rounds: int | None, out: Path | None) -> None:
    """Print and write a table of time and memory, with all contestants taking turns in one run."""
    out = out or Path("runs/bench" if only else "docs/results")
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="bench-") as programs:
        for result in measure(only or PARTS, rounds, Path(programs)):
            replace_file(out / "bench.json", json.dumps(result, indent=1).encode(), durable=False)
            replace_file(out / "bench.md", render(result).encode(), durable=False)
            replace_file(out / "bench.png", draw(result), durable=False)
    click.echo((out / "bench.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
