"""The daemon drains at every signal, in order and by one deadline, and its report names only what exists."""

import contextlib
import json
import os
import pty
import re
import signal
import sys
from pathlib import Path

import httpx
import psutil
import pytest

from deploy.config.config import read_config
from deploy.reports.report import write_report
from deploy.telemetry.run_view import open_view
from tests.support.daemon import ROOT, Daemon, running_daemon, wait_for, write_sinusoid
from trainers.checkpoint import list_checkpoints
from trainers.journal.run_files import RunFiles

QUIET = ("regret.comparator=[]", "regret.baselines=[]", "checkpoint.every_rounds=1000")
HANGING_COMPILER = """#!/bin/sh
case "$*" in *version*) echo "g++ (GCC) 12.2.0"; exit 0;; esac
echo $$ >> {started}
exec sleep 100000
"""


def check_report(run: Path) -> dict[str, object]:
    """Return report.json; check that the page names the files and folders of the run that exist, and no others."""
    report: dict[str, object] = json.loads((run / "report.json").read_text())
    page = (run / "report.html").read_text()
    named = {Path(found) for found in re.findall(rf"{run}[^\s<\",]*", page)}
    named |= {run / found for found in re.findall(r"<code>(\S+\.jsonl)</code>", page)}
    assert all(path.exists() for path in named), named
    newest = max(list_checkpoints(run / "checkpoints"), default=None)
    assert report["checkpoint"] == newest
    assert (run / f"checkpoints/{newest}" in named) == (newest is not None)
    return report


def test_a_hangup_drains(tmp_path: Path) -> None:
    with running_daemon(write_sinusoid(tmp_path), *QUIET) as daemon:
        daemon.submit(*range(3))
        daemon.wait_until_learned(3)
        daemon.process.send_signal(signal.SIGHUP)
        assert daemon.process.wait(200) == 0, daemon.log.read_text()
    assert check_report(tmp_path / "run")["checkpoint"] == 3


@pytest.mark.parametrize("logs", ["text", "json"])
def test_a_closing_terminal_drains(tmp_path: Path, logs: str) -> None:
    """The kernel sends SIGHUP to the processes of the terminal, and writing to it fails from then on."""
    config, run = write_sinusoid(tmp_path, '[[source]]\nkind = "sinusoid"\n'), tmp_path / "run"
    overrides = [part for one in (*QUIET, f"run.logs={logs}") for part in ("--set", one)]
    daemon, terminal = pty.fork()
    if daemon == 0:
        os.chdir(ROOT)
        os.execv(sys.executable, [sys.executable, "-m", "online_meta", "serve", str(config), *overrides])
    os.set_blocking(terminal, False)

    def is_learning() -> bool:
        with contextlib.suppress(BlockingIOError):
            os.read(terminal, 65536)  # so that the terminal does not fill up
        return (run / "rounds.jsonl").exists() and (run / "rounds.jsonl").stat().st_size > 1000

    status = None
    try:
        wait_for("rounds are learned", is_learning)
        children = psutil.Process(daemon).children(recursive=True)
        os.close(terminal)
        _, status = wait_for("the daemon ends", lambda: (ended := os.waitpid(daemon, os.WNOHANG))[0] and ended)
    finally:
        if status is None:
            os.kill(daemon, signal.SIGKILL)
            os.waitpid(daemon, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    learned = len((run / "rounds.jsonl").read_text().splitlines())
    assert check_report(run)["checkpoint"] == learned > 0
    assert children
    assert not [child for child in children if child.is_running()]


def test_a_run_that_compiles_drains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, started = write_sinusoid(tmp_path), tmp_path / "started"
    with running_daemon(config, *QUIET, "engine.batching=loop") as daemon:
        daemon.submit(*range(3))
        daemon.wait_until_learned(3)
        assert daemon.drain() == 0
    compiler = tmp_path / "hanging-g++"
    compiler.write_text(HANGING_COMPILER.format(started=started))
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    with running_daemon(config, *QUIET, "engine.batching=compiled") as daemon:
        daemon.submit(3, 4)
        wait_for("the compiler hangs", started.exists)
        daemon.process.send_signal(signal.SIGINT)
        assert daemon.process.wait(200) == 0, daemon.log.read_text()
        assert "stopped compiling after" in daemon.log.read_text()
    compilers = [int(pid) for pid in started.read_text().split()]
    wait_for("the compilers have ended", lambda: not any(_is_running(pid) for pid in compilers))
    report = check_report(tmp_path / "run")
    assert (report["rounds"], report["checkpoint"]) == (3, 3)


def test_one_deadline_holds_for_everything(tmp_path: Path) -> None:
    """A suspended process neither drains nor reacts to SIGTERM."""
    quiet = [one for one in QUIET if "comparator" not in one]
    with running_daemon(write_sinusoid(tmp_path), *quiet, "serve.drain_seconds=2") as daemon:
        daemon.submit(*range(3))
        daemon.wait_until_learned(3)
        for name in ("trainer", "comparators"):
            daemon.child(name).suspend()
        daemon.submit(3)
        daemon.process.send_signal(signal.SIGTERM)
        assert daemon.process.wait(200) == 75
        log = daemon.log.read_text()
    assert "draining, for at most 2 s" in log
    assert "the trainer ended with exit code -9 and did not drain" in log
    assert "the next start continues at the beginning" in log
    report = check_report(tmp_path / "run")
    assert (report["rounds"], report["checkpoint"]) == (3, None)
    assert "There is no checkpoint" in (tmp_path / "run/report.html").read_text()


def test_further_signals_do_not_interrupt_a_drain(tmp_path: Path) -> None:
    with running_daemon(write_sinusoid(tmp_path), *QUIET) as daemon:
        daemon.submit(*range(3))
        daemon.wait_until_learned(3)
        trainer = daemon.child("trainer")
        trainer.suspend()
        for kind in (signal.SIGINT, signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            daemon.process.send_signal(kind)
            wait_for("it drains", lambda: "draining, for at most 120 s" in daemon.log.read_text())
            wait_for("it listens no more", lambda: not answers(daemon))
        trainer.resume()
        assert daemon.process.wait(200) == 0, daemon.log.read_text()
    assert check_report(tmp_path / "run")["checkpoint"] == 3


def answers(daemon: Daemon) -> bool:
    try:
        return daemon.client.get("/healthz").is_success
    except httpx.TransportError:
        return False


def test_a_report_of_nothing_names_nothing(config: Path) -> None:
    settings = read_config(config)
    run = Path(settings.run.path)
    run.mkdir()
    write_report(run, open_view(RunFiles(run), settings), settings)
    assert check_report(run)["checkpoint"] is None


def _is_running(pid: int) -> bool:
    """Return whether a process runs; one that nobody has waited for yet does not."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
