"""Read random meta-batches of 32 out of 100,000 tasks of 39 kB from a warm cache, in batches and one by one."""

import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from streams.formats import wire
from streams.history.history import History
from streams.history.ledger import FILE
from streams.types import Record
from tests.benchmarks.streams.figure import Figure, make_figure
from tests.benchmarks.works import image_task

TITLE = "Random reads by one thread, with checksums verified and tensors built; the whole history is in the page cache"
TASKS, BATCH, ROUNDS, SECONDS = 100_000, 32, 5, 1.0
TOGETHER = 1_000


def measure(folder: Path) -> dict[str, Any]:
    """Return tasks per second of each way, for each round."""
    with History.open(folder / "history", write=True) as history:
        size = _fill(history)
        _warm(history.path / FILE)
        ways: dict[str, Callable[[list[int]], Any]] = {
            "together": history.tasks,
            "bytes alone": history.payloads,
            "one by one": lambda rounds: [history[round] for round in rounds],
        }
        found: dict[str, Any] = {"bytes": size, **{name: [] for name in ways}}
        for number in range(ROUNDS):
            for name, read in ways.items():
                found[name].append(_measure_rate(read, number))
    return found


def _fill(history: History) -> int:
    bodies = [wire.encode(image_task(5, 1, 1, seed, 18)) for seed in range(16)]
    for first in range(0, TASKS, TOGETHER):
        numbers = range(first, first + TOGETHER)
        history.append([Record(f"t{n}", bodies[n % 16], bytes(32), "s", None, 1.0) for n in numbers])
    return len(bodies[0])


def _warm(file: Path) -> None:
    with open(file, "rb") as opened:
        while opened.read(1 << 24):
            pass


def _measure_rate(read: Callable[[list[int]], Any], seed: int) -> float:
    draws, done, began = random.Random(seed), 0, time.perf_counter()
    while time.perf_counter() - began < SECONDS:
        read([draws.randrange(TASKS) for _ in range(BATCH)])
        done += BATCH
    return done / (time.perf_counter() - began)


def make_figures(samples: dict[str, Any]) -> list[Figure]:
    """Return the figures of the samples."""
    kilobytes = f"tasks of {samples['bytes'] / 1e3:.1f} kB"
    return [
        make_figure(f"{kilobytes} per second, in batches of {BATCH}", samples["together"], 50_000, least=True),
        make_figure("the same, bytes only", samples["bytes alone"]),
        make_figure("tasks per second, one by one", samples["one by one"]),
    ]
