"""Runs of the table of non-stationary streams: each label is a configuration that plays the same histories."""

from collections.abc import Sequence
from importlib.resources import files as package_files
from pathlib import Path
from typing import Any, NamedTuple

import torch
from deploy.commands.compare import Replay
from deploy.reports.comparison import Entry
from tests.experiments.common.histories import make_history
from tests.experiments.common.tables import Row
from trainers.checkpoint import load_latest
from trainers.journal.jsonl import LineReader
from trainers.journal.round_records import SECONDS_SPENT
from trainers.journal.run_files import RunFiles

WINDOW = 20
STEPS, MOST = 3, 6
"""Meta-steps per round and component, and the maximal number of components of the mixture."""

COMPARATOR = "each task's own best"
DYNAMIC_ROUNDS, DYNAMIC_STEPS = 50, 50
"""The number of rounds for which the best initialisation is searched, and the steps of L-BFGS for each."""

CONFIG = Path(str(package_files("deploy"))) / "sinusoid.toml"
SHARED = (
    *("inner.steps=3", "inner.lr=0.02", "meta.batch=5", f"meta.steps_per_round={STEPS}", "engine.batching=traced"),
    *("regret.comparator=[]", "regret.baselines=[]", "regret.options={}", "pool.aggregation=none"),
    *(f"regret.dynamic_rounds={DYNAMIC_ROUNDS}", f"regret.dynamic_steps={DYNAMIC_STEPS}"),
)
"""What all labels change in ``CONFIG``: a small budget, without baselines and pool."""
MORE_STEPS = (f"meta.steps_per_round={STEPS * MOST}",)


class Stream(NamedTuple):
    """A stream of the table: the source and its options."""

    source: str
    options: dict[str, Any]


def _mixture(components: int) -> tuple[str, ...]:
    options = f"regret.options={{ dp_mixture = {{ most = {components} }} }}"
    return ("serve.answers=dp_mixture", "regret.baselines=['dp_mixture']", "regret.baseline_optimizer=meta", options)


STREAMS = {
    "drifting": Stream("drifting_sinusoids", {"period": 50.0}),
    "recurring": Stream("recurring_functions", {"spell": 10}),
    "heavy-tailed": Stream("heavy_tailed_functions", {}),
}
LABELS: dict[str, tuple[str, ...]] = {
    "uniform": ("regret.comparator=['dynamic']",),
    "mixture": _mixture(MOST),
    "one component": _mixture(1),
    f"one component, {STEPS * MOST} steps": (*_mixture(1), *MORE_STEPS),
    f"uniform, {STEPS * MOST} steps": MORE_STEPS,
    "recent": ("meta.replay=recent", f"meta.replay_options={{ window = {WINDOW} }}"),
    "reservoir": ("meta.replay=reservoir", f"meta.replay_options={{ size = {WINDOW} }}"),
    "prioritised": ("meta.replay=prioritised",),
    "all": ("meta.replay=all",),
}
"""What each label changes in ``CONFIG``. The comparator starts from the last leader of uniform replay."""


def list_replays(stream: str, labels: Sequence[str], seeds: Sequence[int], rounds: int, work: Path) -> list[Replay]:
    """Return the runs on a stream; each seed has a history and initial weights of its own."""
    source, options = STREAMS[stream]
    histories = [make_history(work / f"{stream}-{seed}", source, seed, rounds, **options) for seed in seeds]
    return [
        Replay(label, seed, CONFIG, (*SHARED, *LABELS[label]), history, rounds, work / "replays" / stream)
        for seed, history in zip(seeds, histories, strict=True)
        for label in labels
    ]


def make_rows(stream: str, entry: Entry, rounds: int) -> list[Row]:
    """Return the rows of a label on a stream, one for each seed; with uniform replay, those of the comparator, too."""
    rows = []
    for seed, losses in entry.answers().items():
        files = RunFiles(entry.folders[seed])
        asked = {"stream": stream, "rounds": rounds, "seed": seed, "settings": [*SHARED, *LABELS[entry.name]]}
        newest = load_latest(files.checkpoints)
        assert newest is not None
        components = newest.learners[entry.answer].get("counts", torch.zeros(0))
        rows.append(
            {
                "asked": {"label": entry.name, **asked},
                "losses": [float(f"{loss:.6g}") for loss in losses],  # The table needs no more digits.
                "components": [int((components > 0).sum())],
                "seconds": sum(line[SECONDS_SPENT][entry.answer] for line in LineReader(files.rounds).lines()),
            }
        )
        for found in LineReader(files.comparators).lines():
            best = {"total": found["cumulative_loss"], "error": found["standard_error"]}
            rows.append({"asked": {"label": COMPARATOR, **asked}, **best})
    return rows
