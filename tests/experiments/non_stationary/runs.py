"""Runs of the table of non-stationary streams: streams, settings and rows."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import streams.sources
from online_meta import registry
from online_meta.regret.ledger import MAIN_LEARNER
from online_meta.types import Task
from tests.experiments.common.playing import find_task_optima, play_stream
from tests.experiments.common.tables import Row, load_row, save_row
from trainers.settings import (
    EngineSettings,
    InnerSettings,
    MetaSettings,
    ModelSettings,
    RegretSettings,
    TrainerSettings,
)

WINDOW = 20
MIXTURE = "dp_mixture"
STEPS, MOST = 3, 6
"""Meta-steps per round and component, and the maximal number of components of the mixture."""

COMPARATOR = "each task's own best"
DYNAMIC_ROUNDS, DYNAMIC_STEPS = 50, 50
"""The number of rounds for which the best initialisation is searched, and the steps of L-BFGS for each."""


class Stream(NamedTuple):
    """A stream of the table: the source and its options."""

    source: str
    options: dict[str, Any]


class Entry(NamedTuple):
    """One run: a learner on a stream."""

    stream: str
    label: str
    rounds: int
    seed: int


class Variant(NamedTuple):
    """Settings of a learner: FTML with a replay policy, or a mixture with at most ``components`` components."""

    policy: str = "uniform"
    options: dict[str, Any] = {}  # noqa: RUF012  # never changed
    components: int = 0
    steps: int = STEPS


STREAMS = {
    "drifting": Stream("drifting_sinusoids", {"period": 50.0}),
    "recurring": Stream("recurring_functions", {"spell": 10}),
    "heavy-tailed": Stream("heavy_tailed_functions", {}),
}
LABELS = {
    "uniform": Variant(),
    "mixture": Variant(components=MOST),
    "one component": Variant(components=1),
    f"one component, {STEPS * MOST} steps": Variant(components=1, steps=STEPS * MOST),
    f"uniform, {STEPS * MOST} steps": Variant(steps=STEPS * MOST),
    "recent": Variant("recent", {"window": WINDOW}),
    "reservoir": Variant("reservoir", {"size": WINDOW}),
    "prioritised": Variant("prioritised"),
    "all": Variant("all"),
}


def make_settings(label: str, seed: int) -> TrainerSettings:
    """Return the settings of a run, with a small network and budget; the comparator adapts as the learners do."""
    played = LABELS.get(label, Variant())
    baselines = (MIXTURE,) if played.components else ()
    return TrainerSettings(
        ModelSettings("trainers.models:mlp", {"inputs": 1, "outputs": 1, "hidden": [40, 40]}, loss="mse"),
        InnerSettings(steps=3, lr=0.02),
        MetaSettings(
            lr=0.005, steps_per_round=played.steps, batch=5, replay=played.policy, replay_options=played.options
        ),
        regret=RegretSettings(
            baseline_optimizer="meta",
            comparator=(),
            baselines=baselines,
            options={name: {"most": played.components} for name in baselines},
            dynamic_rounds=DYNAMIC_ROUNDS,
            dynamic_steps=DYNAMIC_STEPS,
        ),
        engine=EngineSettings(batching="traced"),
        seed=seed,
    )


def make_tasks(stream: Stream, seed: int, rounds: int) -> list[Task]:
    """Return the first tasks of a stream."""
    module = registry.load_module(streams.sources, stream.source)
    settings = replace(module.Settings(), **stream.options)
    return [module.make_task(settings, seed, t) for t in range(rounds)]


def run_entry(entry: Entry, work: Path) -> Row:
    """Return the row of a run or of its comparator; a saved row is loaded instead of computed."""
    settings = make_settings(entry.label, entry.seed)
    asked = {**entry._asdict(), "meta": asdict(settings.meta), "regret": asdict(settings.regret)}
    file = work / f"{'-'.join(map(str, entry)).replace(' ', '_')}.json"
    if before := load_row(file, asked):
        return before
    tasks = make_tasks(STREAMS[entry.stream], entry.seed, entry.rounds)
    found = (compare if entry.label == COMPARATOR else play)(settings, tasks, work / "programs")
    return save_row(file, {"asked": asked, **found})


def play(settings: TrainerSettings, tasks: list[Task], programs: Path) -> Row:
    """Return the loss and the number of components in each round, and the total seconds."""
    name = MIXTURE if settings.regret.baselines else MAIN_LEARNER
    losses, components, seconds = [], [], 0.0
    for learner, score, spent in play_stream(settings, name, tasks, programs):
        losses.append(float(f"{score.loss_after:.6g}"))  # The table needs no more digits.
        components.append(sum(count > 0 for count in getattr(learner, "counts", ())))
        seconds += spent
    return {"losses": losses, "components": components, "seconds": seconds}


def compare(settings: TrainerSettings, tasks: list[Task], programs: Path) -> Row:
    """Return the cumulative loss of the best initialisation for each task, and the standard error of the estimate."""
    found = find_task_optima(settings, tasks, programs)
    return {"total": found.cumulative_loss, "error": found.standard_error}
