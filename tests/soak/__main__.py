"""Run a daemon with producers and faults, for minutes or for a night: `make soak MINUTES=30`."""

import itertools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from tests.deploy.test_start import can_mount
from tests.soak.checks import Result, check_counts, check_flat, check_log, check_replay, check_sockets, check_tasks
from tests.soak.clock import Clock
from tests.soak.faults import BACKLOG, FAULTS, Scene, possible
from tests.soak.numbers import check_numbers
from tests.soak.watching import Watcher
from tests.support.daemon import ROOT, RestartedDaemon, wait_for
from tests.support.servers import Redis

PRODUCERS = 3
DISK_MIB = 256
MORE = """limits = {{ backlog = {backlog} }}
[history.sealing]
segment_rounds = 64
ledger_bytes = 0
[[source]]
kind = "http"
[[source]]
kind = "files"
folder = "{spool}"
[[source]]
kind = "redis"
url = "{redis}"
stream = "tasks"
"""
MOUNTED = 'mount -t tmpfs -o size="$1"m tmpfs "$2" && shift 2 && exec "$@"'


@click.command()
@click.option("--minutes", type=click.FloatRange(min=0.5), default=30.0, show_default=True)
@click.option(
    "--every", type=click.FloatRange(min=5.0), default=60.0, show_default=True, help="Seconds between faults."
)
@click.option("--faketime", type=click.Path(exists=True, path_type=Path), help="libfaketime, for clock jumps.")
@click.option("--folder", type=click.Path(path_type=Path), hidden=True)
def main(minutes: float, every: float, faketime: Path | None, folder: Path | None) -> None:
    """Let tasks arrive, inject one fault after another, and check at the end that nothing was lost."""
    if folder is None:
        with tempfile.TemporaryDirectory() as made:
            sys.exit(run_on_a_small_disk(Path(made)))
    notes, acknowledged, spool = folder / "notes", [], folder / "spool"
    notes.mkdir()
    spool.mkdir()
    clock = None if faketime is None else Clock(folder, faketime)
    redis = Redis(folder / "redis")
    redis.start()
    more = MORE.format(backlog=BACKLOG, spool=spool, redis=redis.url)
    served = RestartedDaemon(folder, 8, more, ("regret.baselines=[]",), clock and clock.environment)
    scene = Scene(served, redis, clock, acknowledged)
    watcher = Watcher(served)
    watcher.start()
    with producing(folder, served.url, notes, {"files": str(spool), "redis": f"{redis.url}?stream=tasks"}):
        inject_faults(scene, minutes * 60, every)
    for file in notes.iterdir():
        acknowledged += map(json.loads, file.read_text().splitlines())
    results = list(finish(served, watcher, folder, acknowledged))
    redis.stop()
    print(f"after {minutes:g} minutes")
    print_results(results)
    sys.exit(not all(holds for _, holds, _ in results))


def run_on_a_small_disk(folder: Path) -> int:
    """Start again with the run's folder on its own small disk, or without one if mounting is forbidden."""
    (folder / "run").mkdir()
    command = [sys.executable, "-m", "tests.soak", *sys.argv[1:], "--folder", str(folder)]
    if can_mount():
        command = ["unshare", "-rm", "sh", "-c", MOUNTED, "sh", str(DISK_MIB), str(folder / "run"), *command]
    return subprocess.run(command, cwd=ROOT).returncode


@contextmanager
def producing(folder: Path, url: str, notes: Path, others: dict[str, str]) -> Iterator[None]:
    """Run producers until the end of the block."""
    stop = folder / "stop"
    kinds = [("http", url)] * PRODUCERS + list(others.items())
    command = [sys.executable, "-m", "tests.soak.arriving"]
    started = []
    for number, (kind, where) in enumerate(kinds):
        name = f"{kind}{number}"
        arguments = [kind, where, name, str(notes / name), str(stop)]
        started.append(subprocess.Popen([*command, *arguments], cwd=ROOT))
    try:
        yield
    finally:
        stop.touch()
        ends = [one.wait(900) for one in started]
    assert ends == [0] * len(started), f"producers ended with {ends}"


def inject_faults(scene: Scene, seconds: float, every: float) -> None:
    """Inject the possible faults in turn, each ``every`` seconds after the end of the one before."""
    began = time.monotonic()
    able = possible(scene)
    for name in sorted(FAULTS.keys() - set(able)):
        print(f"not possible here: {name}")
    for name in itertools.cycle(able):
        if time.monotonic() + every > began + seconds:
            break
        time.sleep(every)
        at = time.monotonic()
        done = FAULTS[name](scene)
        print(f"{at - began:6.0f} s  {name:16} {time.monotonic() - at:5.1f} s  {done}", flush=True)
    time.sleep(max(0.0, began + seconds - time.monotonic()))


def finish(
    served: RestartedDaemon, watcher: Watcher, folder: Path, acknowledged: list[dict[str, Any]]
) -> Iterator[Result]:
    """Wait until everything is learned, drain the daemon, and check."""

    def learned() -> dict[str, Any] | None:
        status = served.status()
        return status if status["rounds"]["ingested"] >= len(acknowledged) and not status["rounds"]["pending"] else None

    status = wait_for("all rounds are learned", learned, 600)
    yield from check_numbers(served)
    watcher.stop()
    yield check_sockets(served)
    ended = served.drain()
    said = "" if ended == 0 else (folder / "daemon.log").read_text()[-1000:]
    yield "SIGTERM drains the daemon", ended == 0, f"exit {ended} {said}"
    yield from check_tasks(served.run / "history", acknowledged)
    yield from check_counts(status, served.run)
    yield from check_replay(served, folder / "replayed")
    yield from check_flat(watcher.lives)
    yield check_log((folder / "daemon.log").read_text())


def print_results(results: list[Result]) -> None:
    for what, holds, figures in results:
        print(f"{'holds ' if holds else 'BROKEN'}  {what:40} {figures}")


if __name__ == "__main__":
    main()
