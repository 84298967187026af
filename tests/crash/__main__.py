"""Walk all points of all scenarios: `make crash`."""

import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

import click
from rich.progress import Progress

from tests.crash.conftest import MEMORY
from tests.crash.scenarios import SCENARIOS
from tests.crash.walker import Point, Walker, points_of, walk


@click.command()
@click.option("--scenario", type=click.Choice(sorted(SCENARIOS)), multiple=True, help="These only.")
@click.option("--every", type=click.IntRange(min=1), default=1, help="Each so many-th point only.")
@click.option("--walkers", type=click.IntRange(min=1), default=2, show_default=True)
def main(scenario: tuple[str, ...], every: int, walkers: int) -> None:
    """Kill ingest, sealing and retention at every system call that changes a file, and let each call fail."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as folder:
        idle: SimpleQueue[Walker] = SimpleQueue()
        opened = []
        for number in range(walkers):
            (place := Path(folder, str(number))).mkdir()
            opened.append(Walker(place))
            idle.put(opened[-1])
        points = [point for name in scenario or SCENARIOS for point in points_of(opened[0], name)][::every]
        failures = _walk_all(points, idle, walkers)
        for walker in opened:
            walker.close()
    _tell(points, failures, time.monotonic() - began)
    sys.exit(bool(failures))


def _walk_all(points: list[Point], idle: "SimpleQueue[Walker]", walkers: int) -> list[str]:
    failures: list[str] = []
    with Progress(disable=not sys.stderr.isatty()) as progress, ThreadPoolExecutor(walkers) as pool:
        bar = progress.add_task("points", total=len(points))

        def visit(point: Point) -> None:
            walker = idle.get()
            try:
                walk(walker, point)
            except AssertionError as error:
                failures.append(str(error))
                print(error, flush=True)
            finally:
                idle.put(walker)
                progress.advance(bar)

        list(pool.map(visit, points))
    return failures


def _tell(points: list[Point], failures: list[str], seconds: float) -> None:
    counts = Counter((point.scenario, point.kind) for point in points)
    for (scenario, kind), count in sorted(counts.items()):
        print(f"{scenario:8} {kind:12} {count:6} points")
    print(f"{len(points)} points in {seconds:.0f} s; at {len(failures)} something was lost, doubled or damaged")


if __name__ == "__main__":
    main()
