"""Ingest 16 KiB tasks durably over HTTP from 8 clients, in turn with a daemon that does not write them."""

import json
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from streams.history.history import History
from streams.history.maintenance import is_due
from streams.history.retention import RetentionSettings
from streams.history.sealing import SealingSettings
from tests.benchmarks.streams.figure import Figure, make_figure
from tests.benchmarks.streams.load import SIDE, WAYS
from tests.support.daemon import Daemon, free_port, running_daemon, wait_for

TITLE = "HTTP ingest; the trainer of each daemon is stopped, and sealing catches up before the other daemon's turn"
SEALED_SECONDS = 120.0
PROGRAMS = {"durable": "online_meta", "without the commit": "tests.benchmarks.streams.uncommitted"}
ROUNDS, SECONDS, CLIENTS = 5, 4, 8
CONFIG = f"""
[run]
path = "{{run}}"
[task]
x_shape = [1, {SIDE}, {SIDE}]
y = "class"
ways = {WAYS}
[model]
build = "trainers.models:conv4"
args = {{{{ channels = 1, ways = {WAYS}, size = {SIDE} }}}}
[regret]
comparator = []
baselines = []
[[source]]
kind = "http"
[serve]
port = {{port}}
try_tasks = false
limits = {{{{ backlog = 100_000_000 }}}}
"""


def measure(folder: Path) -> dict[str, Any]:
    """Return tasks per second, and the median and 99th percentile of the response time, for each round."""
    found: dict[str, Any] = {name: {"rate": [], "p50": [], "p99": []} for name in PROGRAMS}
    with ExitStack() as cleanup:
        daemons = {}
        for number, (name, program) in enumerate(PROGRAMS.items()):
            config = folder / f"{number}.toml"
            config.write_text(CONFIG.format(run=folder / str(number), port=free_port()))
            daemons[name] = cleanup.enter_context(running_daemon(config, program=program))
            cleanup.enter_context(daemons[name].paused("trainer"))
            _run_load(daemons[name], "warm", 1)
        for round in range(ROUNDS):
            for name, daemon in daemons.items():
                load = _run_load(daemon, f"r{round}", SECONDS)
                wait_for("sealing has caught up", lambda: not _is_sealing_due(folder / "0"), SEALED_SECONDS)
                taken = sorted(load["taken"])
                found[name]["rate"].append(len(taken) / load["seconds"])
                found[name]["p50"].append(taken[len(taken) // 2])
                found[name]["p99"].append(taken[int(0.99 * len(taken))])
    return found


def _is_sealing_due(run: Path) -> bool:
    with History.open(run / "history", write=False) as history:
        return is_due(history, SealingSettings(), RetentionSettings())


def _run_load(daemon: Daemon, name: str, seconds: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.benchmarks.streams.load", daemon.url, str(seconds), str(CLIENTS), name]
    found: dict[str, Any] = json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
    return found


def make_figures(samples: dict[str, Any]) -> list[Figure]:
    """Return the figures of the samples."""
    ours, bare = samples["durable"], samples["without the commit"]
    shares = [one / other for one, other in zip(ours["rate"], bare["rate"], strict=True)]
    return [
        make_figure("durable tasks per second", ours["rate"], 2000, least=True),
        make_figure("milliseconds to a response, p99", [1e3 * value for value in ours["p99"]], 20),
        make_figure("milliseconds to a response, p50", [1e3 * value for value in ours["p50"]]),
        make_figure("tasks per second / the same without the commit", shares, 0.6, least=True),
        make_figure("tasks per second without the commit", bare["rate"]),
    ]
