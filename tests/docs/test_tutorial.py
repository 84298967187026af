"""The tutorial works when its blocks are run in order, as a reader would run them."""

import json
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.docs.pages import ROOT, assert_shown, blocks_of, code_of, read_page

PAGE = read_page("tutorials/your-own-rows.md")
FILE = re.compile(r"\w+\.(py|toml)")
SECONDS = 400.0
"""How long the daemon may take to learn all rounds on a busy machine."""


class Reader:
    """Follows the page in an empty folder: starts one daemon, and runs the other commands to their end."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        bin = folder / "bin"
        bin.mkdir()
        for name, module in (("python", ""), ("online-meta", "-m online_meta")):
            program = bin / name
            program.write_text(f'#!/bin/sh\nexec "{sys.executable}" {module} "$@"\n')
            program.chmod(0o755)
        self.environment = {"PATH": f"{bin}:/usr/bin:/bin", "PYTHONPATH": str(ROOT), "HOME": str(folder)}
        self.daemon: subprocess.Popen[bytes] | None = None

    def write(self, name: str, text: str) -> None:
        (self.folder / name).write_text(self._with_port(text))

    def run(self, commands: str) -> str:
        """Run a block of commands to its end; return what it prints."""
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", self._with_port(commands)],
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{commands}\n{done.stdout}\n{done.stderr}\n{self.log()}"
        return done.stdout

    def serve(self, command: str) -> None:
        """Start the daemon, and leave it running."""
        with open(self.folder / "serve.log", "wb") as log:
            self.daemon = subprocess.Popen(
                ["bash", "-c", f"exec {command}"], cwd=self.folder, env=self.environment, stdout=log, stderr=log
            )

    def wait_until_learned(self, rounds: int) -> None:
        """Wait until the daemon has learned this many rounds; fail if it has more tasks than that."""
        assert self.daemon is not None
        deadline = time.monotonic() + SECONDS
        with httpx.Client(base_url=f"http://127.0.0.1:{self.port}", trust_env=False) as client:
            while True:
                assert self.daemon.poll() is None, self.log()
                assert time.monotonic() < deadline, f"not {rounds} rounds within {SECONDS:g} s:\n{self.log()}"
                try:
                    found = client.get("/v1/status").json()["rounds"]
                except httpx.TransportError:
                    found = {"ingested": 0, "learned": 0}
                assert found["ingested"] <= rounds
                if found["learned"] == rounds:
                    return
                time.sleep(0.2)

    def stop(self) -> int:
        """Send the daemon a SIGTERM; return its exit code."""
        assert self.daemon is not None
        self.daemon.send_signal(signal.SIGTERM)
        return self.daemon.wait(180)

    def log(self) -> str:
        log = self.folder / "serve.log"
        return log.read_text() if log.exists() else ""

    def _with_port(self, text: str) -> str:
        return text.replace("8780", str(self.port))


@pytest.fixture
def reader(tmp_path: Path) -> Iterator[Reader]:
    reader = Reader(tmp_path)
    try:
        yield reader
    finally:
        if reader.daemon is not None and reader.daemon.poll() is None:
            reader.daemon.kill()
            reader.daemon.wait()


@pytest.mark.timeout(900)
def test_the_tutorial_runs_as_written(reader: Reader) -> None:
    printed: dict[str, str] = {}
    output = ""
    rounds = (149, 151)
    for block in blocks_of(PAGE):
        if block.title == "install":
            continue  # the next test compares it with the page on installing
        if FILE.fullmatch(block.title):
            reader.write(block.title, block.text)
        elif block.language == "text":
            assert_shown(block.text, output)
        elif block.text.startswith("online-meta serve"):
            reader.serve(block.text.strip())
            reader.wait_until_learned(rounds[0])
        else:
            assert block.language == "sh"
            if "replay" in block.text:
                assert reader.stop() == 0, reader.log()
                assert (reader.folder / "runs/rows/report.html").exists()
            output = printed[block.text.split()[1]] = reader.run(block.text)
            if "more_rows.py" in block.text:
                reader.wait_until_learned(rounds[1])
    assert {"check", "status", "dead-letters", "replay"} <= printed.keys()

    learners = json.loads((reader.folder / "runs/rows/report.json").read_text())["learners"]
    losses = {name: learner["mean_loss_last_100"] for name, learner in learners.items()}
    assert losses["ftml"] < min(losses["from_scratch"], losses["constant"]), losses
    assert "pool" in losses
    assert "meta-learning" in " ".join(printed["status"].replace("│", " ").split()).lower()
    right = re.search(r"the right answers are (\S+), (\S+) and (\S+)\. ", " ".join(PAGE.split()))
    assert right is not None
    predicted = [float(line) for line in printed["new_pump.py"].splitlines()]
    assert predicted == pytest.approx([float(answer) for answer in right.groups()], abs=0.7)


def test_the_tutorial_installs_as_the_installation_page_says() -> None:
    (install,) = (block.text for block in blocks_of(PAGE) if block.title == "install")
    assert install == code_of(read_page("how-to/install.md"), "sh")[0]
