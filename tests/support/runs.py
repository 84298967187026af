"""A short history of small tasks, and runs on it."""

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import Any

import torch

from online_meta.testing.learner_problems import frozen
from online_meta.types import Batch, Params, Task
from streams.formats import wire
from streams.history.history import History
from streams.types import Record
from trainers.journal.jsonl import LineReader
from trainers.journal.run_files import RunFiles
from trainers.loop.rounds import Run, open_run, play_rounds
from trainers.loop.run import close_run
from trainers.settings import (
    CheckpointSettings,
    InnerSettings,
    MetaSettings,
    ModelSettings,
    RegretSettings,
    TrainerSettings,
)

WAYS = 3
SETTINGS = TrainerSettings(
    model=ModelSettings("trainers.models:mlp", {"inputs": 2, "outputs": WAYS, "hidden": [4]}),
    inner=InnerSettings(steps=1, lr=0.1),
    meta=MetaSettings(lr=0.01, batch=4),
    regret=RegretSettings(options={"from_scratch": {"steps": 2}}),
    checkpoint=CheckpointSettings(every_rounds=3, keep=2),
)


def changed(settings: TrainerSettings, **sections: dict[str, Any]) -> TrainerSettings:
    """Return the settings with the given keys of the given sections changed."""
    parts = {name: replace(getattr(settings, name), **keys) for name, keys in sections.items()}
    return replace(settings, **parts)


FALLING = changed(
    SETTINGS,
    model={"loss": "tests.support.edge:loss"},
    meta={"lr": 1.5, "max_skipped": 3, "steps_per_round": 1},
    regret={"baselines": ()},
    checkpoint={"every_rounds": 1, "keep": 2},
)
"""A run whose meta-steps soon stop being finite, so that its leader is rolled back."""


def task(seed: int, size: float = 1.0) -> Task:
    random = torch.Generator().manual_seed(seed)

    def batch(n: int) -> Batch:
        return Batch(size * torch.randn(n, 2, generator=random), torch.randint(WAYS, (n,), generator=random))

    return Task(batch(6), batch(4))


def fill(history: History, tasks: list[Task]) -> None:
    """Append the tasks, with ids from their rounds."""
    first = len(history)
    bodies = [wire.encode(one) for one in tasks]
    history.append([Record(f"t{first + i}", b, wire.digest(b), "s", None, 1.0) for i, b in enumerate(bodies)])


@contextlib.contextmanager
def opened(folder: Path, history: History, settings: TrainerSettings = SETTINGS) -> Iterator[Run]:
    """Open a run, and close its files in any case, as the end of a process does."""
    run = open_run(settings, RunFiles(folder), history)
    try:
        yield run
    finally:
        close_run(run)


def play(folder: Path, history: History, until: int | None, settings: TrainerSettings = SETTINGS) -> dict[str, Params]:
    """Play until ``until`` rounds are learned; return the bits of every learner."""
    with opened(folder, history, settings) as run:
        assert play_rounds(run, Event(), until) == run.round
        return bits(run)


def bits(run: Run) -> dict[str, Any]:
    return {name: frozen(learner.save()) for name, learner in run.learners.items()}


class Killed(Exception):
    """Simulates the end of a process that could not clean up."""


IDLE_CHECKS = 100
"""The number of checks without an update after which nothing is left to play."""


class KilledAfter(Event):
    """A stop event that ends the process when it is checked after ``updates`` updates of a run, or when it waits."""

    def __init__(self, run: Run, updates: int) -> None:
        super().__init__()
        self.run, self.left = run, updates
        self.seen, self.checks = (run.round, run.idle_updates), 0

    def is_set(self) -> bool:
        now = (self.run.round, self.run.idle_updates)
        self.left -= now != self.seen
        self.checks = self.checks + 1 if now == self.seen else 0
        self.seen = now
        if not self.left or self.checks > IDLE_CHECKS:
            raise Killed
        return super().is_set()


def kill(folder: Path, history: History, updates: int, settings: TrainerSettings = SETTINGS) -> None:
    """Play ``updates`` updates and stop without closing the run in order."""
    with contextlib.suppress(Killed), opened(folder, history, settings) as run:
        play_rounds(run, KilledAfter(run, updates))
        raise AssertionError("there was nothing to play")


def lines(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of the rounds without their durations."""
    return [
        {k: v for k, v in line.items() if not k.startswith("seconds")}
        for line in LineReader(RunFiles(folder).rounds).refresh()
    ]
