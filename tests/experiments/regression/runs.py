"""Runs of the table of regression streams: a learner, or the comparators, on one stream."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import fmean, median
from typing import Any, NamedTuple

from online_meta.regret.closed_form import minimise, quadratic_of, zero_quadratic
from online_meta.regret.ledger import MAIN_LEARNER
from online_meta.regret.scoring import points_needed
from online_meta.types import Score, Task
from streams.sources import drifting_sinusoids
from tests.experiments.common.playing import build_past_context, find_task_optima, play_stream
from tests.experiments.common.tables import Row, load_row, save_row
from tests.experiments.regression.data import Sizes, draw_tasks, load_flights, load_pupils
from trainers.settings import (
    EngineSettings,
    InnerSettings,
    MetaSettings,
    ModelSettings,
    RegretSettings,
    TrainerSettings,
)

NAME = "regression_streams"
COMPARATOR = "comparator"
STEPS, BATCH, INNER_STEPS = 3, 5, 3
WINDOW = 50
PREFIXES = (1, 2, 5, 10)
EVERY = 10
"""Number of rounds between two points of a curve."""
DYNAMIC_ROUNDS, DYNAMIC_STEPS = 25, 50


class Stream(NamedTuple):
    """A stream: ``make(seed, rounds)`` returns its tasks; ``proficiency`` is the loss that counts as reached."""

    about: str
    make: Callable[[int, int], list[Task]]
    inputs: int
    hidden: tuple[int, ...]
    proficiency: float

    @property
    def labels(self) -> tuple[str, ...]:
        """The learners on this stream; the mixture, by far the most expensive one, runs only on the sinusoids."""
        return tuple(label for label in LEARNERS if label != "dp_mixture" or self.make is _make_sinusoids)

    @property
    def linear(self) -> bool:
        """Whether the model is linear, so that regret has a closed form."""
        return not self.hidden


class Entry(NamedTuple):
    """One run: a learner, or the comparators, on a stream."""

    stream: str
    label: str
    rounds: int
    seed: int


@dataclass(frozen=True)
class Choice:
    """Settings of a learner: the step sizes of the inner loop and of the outer optimizer, and its own ``options``."""

    inner_lr: float
    meta_lr: float = 0.01
    options: dict[str, Any] = field(default_factory=dict)
    optimizer: str = "adam"


def _make_sinusoids(seed: int, rounds: int) -> list[Task]:
    settings = drifting_sinusoids.Settings(support=20, query=20, period=60.0)
    return [drifting_sinusoids.make_task(settings, seed, t) for t in range(rounds)]


def _make_flights(seed: int, rounds: int) -> list[Task]:
    return draw_tasks(load_flights(), Sizes(20, 50), seed, rounds)


def _make_schools(seed: int, rounds: int) -> list[Task]:
    return draw_tasks(load_pupils(), Sizes(10, 10), seed, rounds)


STREAMS = {
    "sinusoids": Stream("Sinusoids of drifting amplitude, network 1-40-40-1", _make_sinusoids, 1, (40, 40), 1.0),
    "flights": Stream("Flights, network 6-40-40-1", _make_flights, 6, (40, 40), 0.4),
    "flights_linear": Stream("Flights, linear model", _make_flights, 6, (), 0.4),
    "schools_linear": Stream("Schools, linear model", _make_schools, 3, (), 0.5),
}
BASELINES = ("train_on_everything", "ftl_fine_tune", "from_scratch", "online_reptile", "moml", "aruba", "c_maml")
LEARNERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "ftml": (MAIN_LEARNER, "uniform", {}),
    "ftml_recent": (MAIN_LEARNER, "recent", {"window": WINDOW}),
    **{name: (name, "uniform", {}) for name in (*BASELINES, "dp_mixture")},
}


def make_settings(entry: Entry, choice: Choice) -> TrainerSettings:
    """Return the settings of a run; the comparators adapt as FTML does."""
    stream = STREAMS[entry.stream]
    name, replay, options = LEARNERS["ftml" if entry.label == COMPARATOR else entry.label]
    baselines = () if name == MAIN_LEARNER else (name,)
    return TrainerSettings(
        ModelSettings(
            "trainers.models:mlp", {"inputs": stream.inputs, "outputs": 1, "hidden": [*stream.hidden]}, loss="mse"
        ),
        InnerSettings(steps=INNER_STEPS, lr=choice.inner_lr),
        MetaSettings(
            lr=choice.meta_lr,
            optimizer=choice.optimizer,
            steps_per_round=STEPS,
            batch=BATCH,
            replay=replay,
            replay_options=options,
        ),
        regret=RegretSettings(
            baseline_optimizer="meta",
            comparator=(),
            baselines=baselines,
            options=dict.fromkeys(baselines, choice.options),
            prefixes=PREFIXES,
            dynamic_rounds=DYNAMIC_ROUNDS,
            dynamic_steps=DYNAMIC_STEPS,
        ),
        engine=EngineSettings(batching="traced"),
        seed=entry.seed,
    )


def run_entry(entry: Entry, choice: Choice, work: Path) -> Row:
    """Return the row of one run; a saved row with the same choice is loaded instead of computed."""
    asked = {**entry._asdict(), "choice": vars(choice)}
    file = work / f"{'-'.join(map(str, entry))}.json"
    if before := load_row(file, asked):
        return before
    began = time.process_time()
    settings, stream = make_settings(entry, choice), STREAMS[entry.stream]
    tasks = stream.make(entry.seed, entry.rounds)
    run = compare if entry.label == COMPARATOR else partial(play, LEARNERS[entry.label][0])
    found = run(work / "programs", stream, settings, tasks)
    return save_row(file, {"asked": asked, **found, "seconds": time.process_time() - began})


def play(name: str, programs: Path, stream: Stream, settings: TrainerSettings, tasks: list[Task]) -> Row:
    """Run a learner, and return its losses and its learning efficiency over the last half of the rounds.

    Losses after a few points are medians, because one task on which an inner loop diverges would dominate a mean.
    """
    scores: list[Score] = []
    spent = 0.0
    for _, score, seconds in play_stream(settings, name, tasks, programs):
        scores.append(score)
        spent += seconds
    losses, late, size = [score.loss_after for score in scores], scores[len(scores) // 2 :], len(tasks[0].support.x)
    needed = [points_needed(score, size, stream.proficiency) for score in late]
    reached = [points for points in needed if points is not None]
    shorter = zip(*(score.prefixes for score in late), strict=True)
    return {
        "total": sum(losses),
        "mean": fmean(losses),
        "half": fmean(score.loss_after for score in late),
        "prefixes": {
            **{str(found[0].points): median(each.loss for each in found) for found in shorter},
            str(size): median(score.loss_after for score in late),
        },
        "reached": len(reached) / len(late),
        "points": fmean(reached) if reached else None,
        "curve": [sum(losses[:until]) for until in range(EVERY, len(losses) + 1, EVERY)],
        "round_seconds": spent / len(tasks),
    }


def compare(programs: Path, stream: Stream, settings: TrainerSettings, tasks: list[Task]) -> Row:
    """Return the cumulative losses of the best fixed initialisation, if it is known, and of each task's own best."""
    if not stream.linear:
        found = find_task_optima(settings, tasks, programs)
        return {"static": None, "dynamic": found.cumulative_loss, "dynamic_error": found.standard_error, "curve": []}
    context = build_past_context(settings, tasks)
    total, own, curve = (
        zero_quadratic(sum(value.numel() for value in context.start.weights.values())),
        0.0,
        list[float](),
    )
    for t, task in enumerate(tasks, 1):
        quadratic = quadratic_of(context.inner, context.start, task)
        total, own = total.plus(quadratic), own + minimise(quadratic).value
        if t % EVERY == 0:
            curve.append(minimise(total).value)
    return {"static": minimise(total).value, "dynamic": own, "dynamic_error": 0.0, "curve": curve}
