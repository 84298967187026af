"""Time rounds of fresh processes: ``online-meta replay`` with no program cached, and JAX with its compilation."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import matplotlib

from tests.benchmarks.jax_child import SETTINGS
from tests.benchmarks.rounds.players import JAX_PROGRAM, SINUSOID, Losses, locate_config, read_losses
from trainers.journal.jsonl import LineReader
from trainers.journal.run_files import RunFiles

CACHES = ("HOME", "XDG_CACHE_HOME", "TORCHINDUCTOR_CACHE_DIR", "TMPDIR")
"""The variables that say where programs are cached: each process gets an empty folder. Fonts stay known."""
SETTLED = 20
"""Rounds that may be slow, because something is recorded in them."""


class Start(NamedTuple):
    """A fresh process.

    Attributes:
        wall: seconds from its start to its end.
        rounds: the seconds of each round.
        losses: of each round, before and after adapting.
    """

    wall: float
    rounds: list[float]
    losses: Losses

    @property
    def slowest(self) -> float:
        """The slowest round after the first ``SETTLED`` ones, divided by the median of these rounds."""
        settled = self.rounds[SETTLED:]
        return max(settled) / median(settled)


def time_replay(overrides: Sequence[str], history: Path, rounds: int) -> Start:
    """Return the times of ``online-meta replay`` of the first rounds of a history; raises ``RuntimeError``."""
    with tempfile.TemporaryDirectory(prefix="cold-") as folder:
        out = Path(folder) / "out"
        command = [sys.executable, "-m", "online_meta", "replay", str(locate_config(SINUSOID)), "--json"]
        command += ["--history", str(history), "--rounds", str(rounds), "--out", str(out)]
        for override in (f"run.path={str(Path(folder) / 'run')!r}", *overrides):
            command += ["--set", override]
        own = {**dict.fromkeys(CACHES, folder), "MPLCONFIGDIR": matplotlib.get_configdir()}
        wall, _ = time_process(command, own)
        lines = [*LineReader(RunFiles(out).rounds).lines()]
    return Start(wall, [line["seconds"] for line in lines], read_losses(lines))


def time_jax(order: Path, rounds: int) -> Start:
    """Return the times of JAX on the first rounds of a saved order; raises ``RuntimeError``."""
    wall, printed = time_process([sys.executable, "-m", JAX_PROGRAM, str(order), str(rounds)], SETTINGS)
    found: dict[str, Any] = json.loads(printed.splitlines()[-1])
    return Start(wall, found["seconds"], [(before, after) for before, after in found["losses"]])


def time_process(command: Sequence[str], environment: dict[str, str]) -> tuple[float, str]:
    """Return the seconds of a process and what it printed; raises ``RuntimeError`` if it fails."""
    began = time.perf_counter()
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=False)
    wall = time.perf_counter() - began
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["no output"])[-1])
    return wall, done.stdout
