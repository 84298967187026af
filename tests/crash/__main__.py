"""Walk all points of all scenarios: `make crash`."""

import logging
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import click

from tests.crash.conftest import MEMORY
from tests.crash.lives import SCENARIOS
from tests.crash.walker import Point, read_point
from tests.crash.walking import Walkers, choose_points

PROGRESS_SECONDS = 60.0


@click.command()
@click.option("--scenario", type=click.Choice(sorted(SCENARIOS)), multiple=True, help="Run only these scenarios.")
@click.option("--seed", default=0, show_default=True, help="Seed of the random scenarios and of the drawn points.")
@click.option("--lives", type=click.IntRange(min=0), default=8, show_default=True, help="How many random scenarios.")
@click.option("--every", type=click.IntRange(min=1), default=1, help="Visit only every n-th point.")
@click.option("--point", multiple=True, help="Visit only this point, as a failure prints it.")
@click.option("--log", type=click.Path(path_type=Path), help="File of points that passed; they are skipped.")
@click.option("--walkers", type=click.IntRange(min=1), default=2, show_default=True)
def main(
    scenario: tuple[str, ...],
    seed: int,
    lives: int,
    every: int,
    point: tuple[str, ...],
    log: Path | None,
    walkers: int,
) -> None:
    """Kill lives of a history at each system call that changes a file, or let the call fail; then fault the restart."""
    began = time.monotonic()
    logging.disable(logging.WARNING)  # what each life says of its rows
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that the folder is removed
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None))
        walkers_pool = stack.enter_context(Walkers(Path(folder), walkers))
        if point:
            points = [read_point(said) for said in point]
        else:
            points = choose_points(walkers_pool, list(scenario or SCENARIOS), seed, 0 if scenario else lives)[::every]
        passed = set(log.read_text().splitlines()) if log is not None and log.exists() else set()
        left = [one for one in points if str(one) not in passed]
        print(f"{len(points)} points, {len(points) - len(left)} of them passed before", flush=True)
        failures = visit(walkers_pool, left, log)
    print_summary(points, failures, time.monotonic() - began)
    sys.exit(bool(failures))


def visit(walkers_pool: Walkers, points: list[Point], log: Path | None) -> list[Point]:
    """Walk the points; print progress every minute, append passed points to ``log``, and return the failed points."""
    began = reported = time.monotonic()
    failures: list[Point] = []
    for count, (point, failure) in enumerate(walkers_pool.walk_all(points), start=1):
        if failure is not None:
            failures.append(point)
            print(f"{failure}\n  again: make crash ARGS=\"--point '{point}'\"", flush=True)
        elif log is not None:
            with log.open("a") as file:
                file.write(f"{point}\n")
        if time.monotonic() - reported >= PROGRESS_SECONDS:
            reported = time.monotonic()
            left = (reported - began) / count * (len(points) - count) / 60
            print(f"{count:6} of {len(points)} points, {len(failures)} failed, {left:.0f} minutes left", flush=True)
    return failures


def print_summary(points: Sequence[Point], failures: Sequence[Point], seconds: float) -> None:
    counts = Counter((point.scenario, "second" if point.first else "first", point.kind) for point in points)
    for (scenario, fault, kind), count in sorted(counts.items()):
        print(f"{scenario:12} {fault:6} fault {kind:12} {count:6} points")
    twice = sum(point.first is not None for point in points)
    print(
        f"{len(points)} points ({twice} of them with a second fault) in {seconds / 60:.1f} minutes; "
        f"at {len(failures)} something was lost, duplicated or damaged"
    )


if __name__ == "__main__":
    main()
