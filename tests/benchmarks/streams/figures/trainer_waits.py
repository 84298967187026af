"""Measure how long a trainer waits for past tasks, as a share of its rounds: Conv4, 5-way 1-shot."""

import time
from pathlib import Path
from threading import Event
from typing import Any

from streams.formats import wire
from streams.history.history import History
from streams.types import Record
from tests.benchmarks.one_rank import BATCH, SIDE, WAYS
from tests.benchmarks.streams.figure import Figure, make_figure
from tests.benchmarks.works import image_task
from trainers.journal.run_files import RunFiles
from trainers.loop.rounds import open_run, play_rounds
from trainers.loop.run import close_run
from trainers.settings import ModelSettings, TrainerSettings

TITLE = f"Waiting for past tasks: exact MAML, Conv4-32, {SIDE} x {SIDE}, {BATCH} tasks per meta-step, one thread"
ROUNDS = 5


def measure(folder: Path) -> dict[str, Any]:
    """Return the seconds of each round, and the seconds in it that the trainer waited for tasks."""
    files, count = RunFiles(folder), BATCH + ROUNDS
    settings = TrainerSettings(
        model=ModelSettings("trainers.models:conv4", {"channels": 3, "size": SIDE, "ways": WAYS}, "cross_entropy")
    )
    with History.open(files.history, write=True) as history:
        bodies = [wire.encode(image_task(WAYS, 1, 15, number, SIDE)) for number in range(count)]
        history.append([Record(f"t{n}", body, bytes(32), "s", None, 1.0) for n, body in enumerate(bodies)])
        run = open_run(settings, files, history)
        found: dict[str, Any] = {"seconds": [], "waited": []}
        play_rounds(run, Event(), BATCH)
        for _ in range(ROUNDS):
            began, waited = time.perf_counter(), run.buffer.waited_seconds
            play_rounds(run, Event(), run.round + 1)
            found["seconds"].append(time.perf_counter() - began)
            found["waited"].append(run.buffer.waited_seconds - waited)
        close_run(run)
    return found


def make_figures(samples: dict[str, Any]) -> list[Figure]:
    """Return the figures of the samples."""
    shares = [waited / seconds for waited, seconds in zip(samples["waited"], samples["seconds"], strict=True)]
    return [
        make_figure("time waiting for tasks / time of a round", shares, 0.01),
        make_figure("milliseconds waiting per round", [1e3 * waited for waited in samples["waited"]]),
        make_figure("seconds per round", samples["seconds"]),
    ]
