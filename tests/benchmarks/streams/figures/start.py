"""Start a daemon whose history has 1,000,000 learned tasks, in turn with one that has 1,000."""

import json
import time
from pathlib import Path
from typing import Any

import psutil

from deploy.config.config import read_config
from deploy.telemetry.run_view import RunView
from online_meta.regret.ledger import MAIN_LEARNER
from streams.formats import wire
from streams.history.history import History
from streams.sources.sinusoid import make_task
from streams.types import Record
from tests.benchmarks.streams.figure import Figure, make_figure
from tests.support.daemon import free_port, running_daemon, sinusoid_config, wait_for
from trainers.journal.run_files import RunFiles
from trainers.loop.recovery import start_checkpoint
from trainers.loop.rounds import open_run
from trainers.loop.run import close_run

TITLE = "Time from the command to the first response of a daemon (imports included), and its memory at that point"
FEW, MANY, ROUNDS, TOGETHER = 1_000, 1_000_000, 3, 10_000
NO_OTHERS = """
[regret]
comparator = []
baselines = []
"""
"""Sections of a run in which the leader plays alone."""


def measure(folder: Path) -> dict[str, Any]:
    """Return the seconds, and the bytes of daemon and trainer, for each number of tasks and round."""
    configs = {count: _build(folder, count) for count in (FEW, MANY)}
    found: dict[str, Any] = {str(count): {"seconds": [], "daemon": [], "trainer": []} for count in configs}
    found["sums"] = _time_summing(RunFiles(folder / str(MANY)))
    for _ in range(ROUNDS):
        for count, config in configs.items():
            samples, began = found[str(count)], time.perf_counter()
            with running_daemon(config) as daemon:
                samples["seconds"].append(time.perf_counter() - began)
                trainer = daemon.child("trainer")
                log = config.with_suffix(".log")
                message = f"the trainer continues at round {count}"
                wait_for("the trainer continues", lambda log=log, line=message: line in log.read_text(), 300)
                samples["daemon"].append(psutil.Process(daemon.process.pid).memory_info().rss)
                samples["trainer"].append(trainer.memory_info().rss)
                log.write_text("")
    return found


def _build(folder: Path, count: int) -> Path:
    """Create the files of a run that has learned ``count`` small tasks; return its configuration."""
    files, config = RunFiles(folder / str(count)), folder / f"{count}.toml"
    config.write_text(sinusoid_config(files.folder, free_port(), sections=NO_OTHERS))
    body = wire.encode(make_task(0, 0, 5, 5))
    with History.open(files.history, write=True) as history:
        for first in range(0, count, TOGETHER):
            numbers = range(first, min(first + TOGETHER, count))
            history.append([Record(f"t{n}", body, bytes(32), "s", None, 1.0) for n in numbers])
        run = open_run(read_config(config).trainer(), files, history)
        with open(files.rounds, "w") as lines:
            lines.writelines(json.dumps(_make_line(number), separators=(",", ":")) + "\n" for number in range(count))
        run.round = count
        start_checkpoint(run)
        close_run(run)
    return config


def _time_summing(files: RunFiles) -> float:
    """Return the seconds to compute the running sums over all rounds at once."""
    began = time.perf_counter()
    view = RunView(files, (MAIN_LEARNER,))
    view.refresh()
    view.close()
    return time.perf_counter() - began


def _make_line(number: int) -> dict[str, Any]:
    losses = {"loss_before": 1.2345678901234567, "loss_after": 0.7654321098765432, "accuracy": None}
    step = {"norm": 0.12345678901234568, "skipped": None}
    record = {"round": number, "id": f"t{number}", "source": "s", "replayed": 25, "seconds": 0.012345, "skipped": None}
    return {**record, **losses, "learners": {"ftml": losses}, "steps": [step]}


def make_figures(samples: dict[str, Any]) -> list[Figure]:
    """Return the figures of the samples."""
    few, many = samples[str(FEW)], samples[str(MANY)]
    more = [one - other for one, other in zip(many["seconds"], few["seconds"], strict=True)]
    figures = [
        make_figure(f"seconds to start with {MANY:,} tasks", many["seconds"], 2.0),
        make_figure(f"additional seconds compared with {FEW:,} tasks", more),
    ]
    figures.append(make_figure("seconds to rebuild the running sums over the rounds", [samples["sums"]]))
    for name in ("daemon", "trainer"):
        added = [(one - other) / 1e6 for one, other in zip(many[name], few[name], strict=True)]
        figures.append(make_figure(f"additional MB in the {name}", added))
    return figures
