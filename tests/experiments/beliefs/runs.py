"""One run of a table of beliefs: play a stream whose Bayes answers are exact, then answer held-out tasks."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import streams.sources
import torch
from deploy.config.config import read_config
from online_meta import registry
from online_meta.batches import only_tensor
from online_meta.prediction import mean_of, nll_of
from online_meta.regret.calibration import add, count_calibration
from online_meta.types import Batch, Calibration, Learner, Prediction, Task
from online_meta.uncertainty import quantiles_of
from streams.sources import Oracle
from tests.experiments.common.playing import play_stream
from tests.experiments.common.tables import Row, load_row, save_row
from trainers.settings import TrainerSettings

CONFIGS = Path("deploy")
BATCH = 16
BATCHING = "traced"
HELD_OUT, HELD_OUT_SEED = 200, 1_000_000
"""Tasks that are answered at the end of a run, the same for all learners and seeds; no run learns from this seed."""
DRAWN, GRID = 3, 61
"""Held-out tasks that are drawn in the picture, and the inputs at which their answers are drawn."""
LEVELS = (0.05, 0.5, 0.95)
POINTS = 8
"""Points of a learning curve, each from the first ``CURVE_TASKS`` held-out tasks."""
CURVE_TASKS = 40


@dataclass(frozen=True)
class Contestant:
    """A learner of a table.

    Attributes:
        title: its name on the page.
        changes: what its configuration changes, as the arguments of ``--set``.
    """

    title: str
    changes: tuple[str, ...]


def make_settings(source: str, contestant: Contestant, seed: int) -> TrainerSettings:
    """Return the settings of a run on a source: those of its example configuration, with the contestant's changes."""
    common = (
        f"run.seed={seed}",
        "meta.steps_per_round=1",
        f"meta.batch={BATCH}",
        "regret.baselines=[]",
        "pool.aggregation=none",
        "inner.answer_steps=[]",
        "engine.threads=1",
        f"engine.batching={BATCHING}",
    )
    return read_config(CONFIGS / f"{source}.toml", (*common, *contestant.changes)).trainer()


def run(source: str, name: str, contestant: Contestant, seed: int, rounds: int, work: Path) -> Row:
    """Return the row of one run; a saved row of the same configuration is loaded instead of computed."""
    asked = {
        "source": source,
        "name": name,
        "seed": seed,
        "rounds": rounds,
        "title": contestant.title,
        "changes": [*contestant.changes],
    }
    file = work / f"{source}-{name}-{seed}.json"
    if before := load_row(file, asked):
        return before
    module = registry.load_module(streams.sources, source)
    options, settings = module.Settings(), make_settings(source, contestant, seed)
    predict: Oracle = module.oracle(options)
    held_out = [module.make_task(options, HELD_OUT_SEED, t) for t in range(HELD_OUT)]
    exact = [predict(task.support, task.query.x) for task in held_out]
    tasks = [module.make_task(options, seed, t) for t in range(rounds)]
    seconds, curve = 0.0, []
    marks = {round((part + 1) * rounds / POINTS) for part in range(POINTS)}
    learner: Learner | None = None
    for count, played in enumerate(play_stream(settings, "ftml", tasks, work / "programs"), 1):
        learner, seconds = played.learner, seconds + played.seconds
        if count in marks:
            found = measure(learner, held_out[:CURVE_TASKS], exact)
            curve.append([count, sum(found["excess"]) / CURVE_TASKS])
    assert learner is not None
    row = {"asked": asked, "seconds": seconds, "curve": curve, **measure(learner, held_out, exact)}
    return save_row(file, {**row, "drawn": draw_answers(learner, predict, held_out[:DRAWN])})


def answer(learner: Learner, support: Batch, x: torch.Tensor) -> Prediction:
    """Return a learner's answer to a task that it does not learn."""
    with torch.no_grad():
        return learner.answers(learner.state(), support, x)[""]


def measure(learner: Learner, tasks: Sequence[Task], exact: Sequence[Prediction]) -> dict[str, Any]:
    """Return a learner's figures on tasks: for each, nats above Bayes and both squared errors; counts over all."""
    excess, nlls, errors, least_errors = [], [], [], []
    counts: list[Calibration] = []
    exact_counts: list[Calibration] = []
    for task, best in zip(tasks, exact, strict=False):
        x, y = only_tensor(task.query.x), only_tensor(task.query.y)
        found = answer(learner, task.support, x)
        nll = float(nll_of(found, y).double().mean())
        nlls.append(nll)
        excess.append(nll - float(nll_of(best, y.double()).mean()))
        errors.append(float((mean_of(found).double() - y).square().mean()))
        least_errors.append(float((mean_of(best) - y).square().mean()))
        own, best_own = count_calibration(found, y), count_calibration(best, y.double())
        assert own is not None
        assert best_own is not None
        counts.append(own)
        exact_counts.append(best_own)
    return {
        "excess": excess,
        "nll": nlls,
        "mse": errors,
        "bayes_mse": least_errors,
        "pit": [*add(*counts).pit],
        "bayes_pit": [*add(*exact_counts).pit],
    }


def draw_answers(learner: Learner, predict: Oracle, tasks: Sequence[Task]) -> list[dict[str, Any]]:
    """Return the quantiles of the learner's and of the exact answers over a grid of inputs, for each task."""
    drawn = []
    for task in tasks:
        seen, x = only_tensor(task.support.x), torch.cat([only_tensor(one.x) for one in task])
        grid = torch.linspace(float(x.min()), float(x.max()), GRID)[:, None]
        answers = {"own": answer(learner, task.support, grid), "exact": predict(task.support, grid)}
        found: dict[str, Any] = {name: _quantiles(prediction) for name, prediction in answers.items()}
        points = {"x": seen[:, 0].tolist(), "y": only_tensor(task.support.y)[:, 0].tolist()}
        drawn.append({**found, "grid": grid[:, 0].tolist(), "support": points})
    return drawn


def _quantiles(prediction: Prediction) -> list[list[float]]:
    found = quantiles_of(prediction, LEVELS)
    assert found is not None
    quantiles: list[list[float]] = found[..., 0].tolist()
    return quantiles
