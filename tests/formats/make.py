"""Make the fixtures of the version that is checked out: ``python -m tests.formats.make tests/formats/VERSION``.

The folder holds a configuration for each run, ``<run>.toml``. A real daemon serves it. Its run folder is copied next to
the configuration, without the files of a running daemon. ``expected.json`` holds what this version reads from it.
"""

import json
import shutil
import sqlite3
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path

from tests.formats.reading import compare, continue_run, read_checkpoint, read_tasks, read_weights
from tests.support.daemon import ROOT, Daemon, running_daemon, wait_for

RUNNING = ("*.lock", "*-wal", "*-shm", "ranks.json", "agent.json")
PICTURES = ("regret.png", "report.html")


def count_lines(file: Path, **values: object) -> int:
    """Count the lines of a file of JSON lines that have these values."""
    lines = map(json.loads, file.read_text().splitlines()) if file.exists() else ()
    return sum(all(line[key] == value for key, value in values.items()) for line in lines)


def ask(run: Path, question: str) -> int:
    """Query the ledger of a run for a number."""
    ledger = sqlite3.connect(f"file:{run}/history/ledger.sqlite?mode=ro", uri=True)
    try:
        return int(ledger.execute(question).fetchall()[0][0])
    finally:
        ledger.close()


def wait(daemon: Daemon, run: Path, rounds: int, comparator: str | None, idle_updates: int = 0) -> None:
    """Wait until the rounds are learned and compared, and until the idle updates after them are made."""
    daemon.wait_until_learned(rounds)
    if comparator:
        compared = {"kind": comparator, "as_of_round": rounds}
        wait_for("the comparator", lambda: count_lines(run / "comparators.jsonl", **compared))
    planned = {"round": rounds, "rounds": 0}
    wait_for("idle updates", lambda: count_lines(run / "history/plans.jsonl", **planned) == idle_updates)
    wait_for("the last checkpoint", lambda: (run / f"checkpoints/{rounds}").exists() or not idle_updates)


def serve_run(config: Path, run: Path) -> None:
    """Serve twelve rounds, and reject one task."""
    with running_daemon(config) as daemon:
        daemon.post(b"this is no task", "no-task")
        wait(daemon, run, 12, "hindsight")
        assert daemon.drain() == 0


def serve_archived(config: Path, run: Path) -> None:
    """Serve ten rounds, idle, serve seven more, and seal fifteen of them."""
    with running_daemon(config) as daemon:
        wait(daemon, run, 10, "dynamic", idle_updates=2)
        assert daemon.drain() == 0
    more = config.with_name("more.toml")
    more.write_text(config.read_text().replace("tasks = 10", "tasks = 17"))
    with running_daemon(more) as daemon:
        wait(daemon, run, 17, "dynamic", idle_updates=2)
        wait_for("rounds are sealed", lambda: ask(run, "SELECT count(*) FROM payloads") == 2)
        assert daemon.drain() == 0


def serve_rolled_back(config: Path, run: Path) -> None:
    """Serve thirty rounds with several rollbacks."""
    with running_daemon(config) as daemon:
        wait(daemon, run, 30, "closed_form")
        assert daemon.drain() == 0


def serve_thinned(config: Path, run: Path) -> None:
    """Serve rounds one by one until retention has removed some of them."""
    decided = "(SELECT coalesce(max(decided), 0) FROM decisions)"
    removed = f"""SELECT count(*) FROM rounds WHERE round < {decided}
        AND round NOT IN held AND round NOT IN (SELECT round FROM thinned)"""
    with running_daemon(config) as daemon:
        for task in count():
            daemon.submit(task)
            wait(daemon, run, task + 1, None)
            if ask(run, removed) and ask(run, "SELECT count(*) FROM thinned"):
                break
            time.sleep(0.5)
        assert daemon.drain() == 0


def serve_by_ranks(config: Path, run: Path) -> None:
    """Serve the rounds of ``run`` with two ranks of DeepSpeed."""
    sets = [f"run.path={run.relative_to(ROOT)}", "engine.kind=deepspeed", "engine.processes=2"]
    with running_daemon(config, *sets, "engine.zero_stage=1", "regret.comparator=[]") as daemon:
        wait(daemon, run, 12, None)
        assert daemon.drain() == 0


SERVE = {
    "run": serve_run,
    "run_archived": serve_archived,
    "run_rolled_back": serve_rolled_back,
    "run_thinned": serve_thinned,
}


def main(target: Path) -> None:
    """Make all fixtures in ``target``, replacing existing ones."""
    expected: dict[str, object] = {}
    for name, serve in SERVE.items():
        run = make_run(serve, target / f"{name}.toml", name)
        shutil.rmtree(target / name, ignore_errors=True)
        left_out = RUNNING if name == "run" else (*RUNNING, *PICTURES)
        shutil.copytree(run, target / name, ignore=shutil.ignore_patterns(*left_out))
        expected[name] = read_all(target, name)
    run = make_run(serve_by_ranks, target / "run.toml", "run_deepspeed")
    shutil.rmtree(target / "checkpoint_deepspeed", ignore_errors=True)
    shutil.copytree(run / "checkpoints/12", target / "checkpoint_deepspeed")
    expected["checkpoint_deepspeed"] = read_checkpoint(target / "checkpoint_deepspeed")
    (target / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")


def make_run(serve: Callable[[Path, Path], None], config: Path, name: str) -> Path:
    """Serve a run with a copy of its configuration, so that the log is temporary; return the run's folder."""
    run = ROOT / "runs" / name
    shutil.rmtree(run, ignore_errors=True)
    with tempfile.TemporaryDirectory() as folder:
        serve(Path(shutil.copy(config, folder)), run)
    return run


def read_all(target: Path, name: str) -> dict[str, object]:
    """Return what this version reads from a run folder, and how it continues the run by two tasks."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(shutil.copytree(target / name, Path(folder) / "run"))
        config = target / f"{name}.toml"
        found: dict[str, object] = {
            "tasks": read_tasks(run / "history"),
            "checkpoints": {one.name: read_checkpoint(one) for one in sorted(run.glob("checkpoints/[0-9]*"))},
            "leader": read_weights(run / "leader.safetensors"),
        }
        found["continued"] = continue_run(config, run, 2)
        found["compared"] = compare(config, run)
        return found


if __name__ == "__main__":
    main(Path(sys.argv[1]))
