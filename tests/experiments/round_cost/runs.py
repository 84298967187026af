"""Prepare runs that stand at given rounds, and measure their next rounds: CPU time, wall time and memory."""

import gc
import shutil
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from importlib.resources import files as package_files
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event
from typing import ParamSpec, TypeVar

from deploy.config.config import read_config
from streams.history.history import History
from tests.experiments.common.tables import Row
from tests.experiments.round_cost.fast_forward import fast_forward, play
from tests.experiments.round_cost.loss import POLICIES
from trainers.journal.run_files import RunFiles
from trainers.loop.rounds import open_run, play_rounds
from trainers.loop.run import Run, close_run
from trainers.loop.task_prefetch import TASKS_PER_FILL
from trainers.settings import TrainerSettings

P = ParamSpec("P")
T = TypeVar("T")

UNBOUNDED = "all"
SMALL = (
    "inner.steps=1",
    "meta.steps_per_round=1",
    "engine.batching=traced",
    "checkpoint.every_rounds=25",
    "regret.comparator=[]",
    "regret.baselines=[]",
)
"""The sinusoid network of deploy/sinusoid.toml with one inner step and one meta-step of 10 tasks per round."""


def make_settings(policy: str, overrides: tuple[str, ...] = ()) -> TrainerSettings:
    """Return the settings for a run of a policy."""
    file = Path(str(package_files("deploy") / "sinusoid.toml"))
    return read_config(file, (*SMALL, *POLICIES[policy], *overrides)).trainer()


def locate_state(work: Path, policy: str, round: int) -> Path:
    """Return the folder of a policy's run that stands at ``round``."""
    return work / "states" / f"{policy.replace(' ', '_')}-{round}"


def make_state(work: Path, policy: str, settings: TrainerSettings, round: int, before: int, played: bool) -> None:
    """Create the run that stands at ``round`` from the one that stands at ``before`` (0 for a new run), and save it.

    Its rounds are played if ``played``, else fast-forwarded.
    """
    target = locate_state(work, policy, round)
    unfinished = target.with_name(f".{target.name}")
    if target.exists():
        return
    if not unfinished.exists() or not played:  # A played run continues from its last checkpoint.
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        if before:
            shutil.copytree(locate_state(work, policy, before), unfinished, dirs_exist_ok=True)
    with History.open(work / "history", write=False) as history:
        (play if played else fast_forward)(settings, RunFiles(unfinished), history, round)
    unfinished.rename(target)


def count_catching_up(round: int) -> int:
    """Return in how many rounds a run that is opened at ``round`` has stacked all past tasks, which takes time once."""
    return round // TASKS_PER_FILL + 1


def time_rounds(
    work: Path, policy: str, settings: TrainerSettings, rounds: Sequence[int], turns: int, block: int
) -> list[Row]:
    """Return the seconds per round of runs that stand at ``rounds``, measured in blocks of ``block`` rounds.

    The past tasks of a run are stacked before. The runs take turns, so that other work on the machine affects all of
    them equally. A block ends with a checkpoint, which a normal run writes at intervals, too.
    """
    found: list[Row] = [{"round": round, "cpu": [], "wall": []} for round in rounds]
    with ExitStack() as stack:
        runs = [_open_copy(stack, work, policy, settings, round) for round in rounds]
        for run in runs:
            play_rounds(run, Event(), run.round + block + count_catching_up(run.round))
        for turn in range(turns):
            for place in range(len(runs)):
                place = (place + turn) % len(runs)
                began = time.process_time(), time.perf_counter()
                play_rounds(runs[place], Event(), runs[place].round + block)
                found[place]["cpu"].append((time.process_time() - began[0]) / block)
                found[place]["wall"].append((time.perf_counter() - began[1]) / block)
    return found


def measure_memory(work: Path, policy: str, settings: TrainerSettings, round: int, block: int) -> Row:
    """Return the memory of this process after it opens the run that stands at ``round`` and plays two blocks."""
    with ExitStack() as stack:
        run = _open_copy(stack, work, policy, settings, round)
        play_rounds(run, Event(), round + block)
        _reset_peak()
        play_rounds(run, Event(), round + 2 * block)
        gc.collect()
        return read_memory()


def _open_copy(stack: ExitStack, work: Path, policy: str, settings: TrainerSettings, round: int) -> Run:
    folder = Path(stack.enter_context(TemporaryDirectory(dir=work / "copies")))
    shutil.copytree(locate_state(work, policy, round), folder, dirs_exist_ok=True)
    history = stack.enter_context(History.open(work / "history", write=False))
    run = open_run(settings, RunFiles(folder), history)
    stack.callback(close_run, run)
    return run


def read_memory() -> Row:
    """Return the bytes of this process: ``resident``, ``anonymous`` (without pages of files), and ``peak``."""
    rollup = _read_kilobytes(Path("/proc/self/smaps_rollup"))
    status = _read_kilobytes(Path("/proc/self/status"))
    return {
        "resident": 1024 * rollup["Rss"],
        "anonymous": 1024 * rollup["Anonymous"],
        "peak": 1024 * status["VmHWM"],
    }


def _reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def _read_kilobytes(file: Path) -> dict[str, int]:
    pairs = (line.split() for line in file.read_text().splitlines())
    return {pair[0].rstrip(":"): int(pair[1]) for pair in pairs if len(pair) == 3 and pair[2] == "kB"}


def call_in_new_process(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call the function in a new process, and return its result."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *args, **kwargs).result()
