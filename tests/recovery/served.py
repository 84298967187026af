"""A daemon that may die at any moment and is started again, for tests that kill it."""

import hashlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import psutil

from tests.daemon import free_port, wait_for
from trainers.checkpoint import list_checkpoints, load_latest

CONFIG = """
[run]
path = {path}
[task]
x_shape = [1]
y = "real"
y_shape = [1]
[model]
build = "trainers.models:mlp"
args = {{ inputs = 1, outputs = 1, hidden = [16] }}
loss = "mse"
[inner]
steps = 2
[meta]
batch = 4
max_rounds_per_update = {together}
[regret]
every_rounds = 20
baselines = ["train_on_everything"]
[checkpoint]
every_rounds = 7
[serve]
port = {port}
"""


class Served:
    """One run and the daemon that serves it now."""

    def __init__(
        self,
        folder: Path,
        together: int = 1,
        more: str = "",
        overrides: tuple[str, ...] = (),
        surroundings: dict[str, str] | None = None,
    ) -> None:
        """Write a configuration into ``folder``, with ``more`` sections, and start the daemon with ``overrides``.

        ``surroundings`` are the environment variables of the daemon, if not those of this process.
        """
        self.surroundings = surroundings
        self.overrides = [word for override in overrides for word in ("--set", override)]
        self.folder = folder
        self.run = folder / "run"
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.config = folder / "config.toml"
        folder.mkdir(parents=True, exist_ok=True)
        self.config.write_text(CONFIG.format(path=f'"{self.run}"', port=self.port, together=together) + more)
        self.start()

    def start(self) -> None:
        """Start the daemon and wait until it answers."""
        with open(self.folder / "daemon.log", "ab") as log:
            command = [sys.executable, "-m", "online_meta", "serve", str(self.config), *self.overrides]
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=self.surroundings)
        wait_for("the daemon answers", lambda: self.process.poll() is not None or self.answers())
        assert self.process.poll() is None, (self.folder / "daemon.log").read_text()

    def answers(self) -> bool:
        """Whether the daemon is alive."""
        try:
            return httpx.get(f"{self.url}/healthz", timeout=5).is_success
        except httpx.TransportError:
            return False

    def children(self, name: str) -> list[int]:
        """Return the process ids of the daemon's children of that name."""
        try:
            found = psutil.Process(self.process.pid).children()
            return [child.pid for child in found if f"deploy.processes.{name}" in child.cmdline()]
        except psutil.NoSuchProcess:
            return []

    def rank(self, number: int) -> int | None:
        """Return the process id of a rank of the trainer that is alive now."""
        for agent in self.children("ranks"):
            try:
                for child in psutil.Process(agent).children():
                    if child.environ().get("RANK") == str(number) and child.status() != psutil.STATUS_ZOMBIE:
                        return child.pid
            except psutil.Error:  # It has just ended.
                continue
        return None

    def kill(self, name: str) -> bool:
        """Kill -9 the daemon itself or one of its children, if it lives; a killed daemon is started again."""
        if name != "daemon":
            pids = self.children(name)
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
            return bool(pids)
        orphans = [child.pid for child in psutil.Process(self.process.pid).children(recursive=True)]
        self.process.kill()
        self.process.wait()
        wait_for("the orphans die", lambda: not any(psutil.pid_exists(pid) for pid in orphans))
        self.start()
        return True

    def status(self) -> dict[str, dict[str, int]]:
        """Return the daemon's status."""
        found: dict[str, dict[str, int]] = httpx.get(f"{self.url}/v1/status", timeout=10).json()
        return found

    def drain(self) -> int:
        """Stop the daemon by SIGTERM; return its exit code."""
        self.process.terminate()
        return self.process.wait(120)

    def hash(self) -> str:
        """Return the SHA-256 of the parameters and optimizer states of all learners in the newest checkpoint."""
        return hash_of(self.run / "checkpoints")


def hash_of(checkpoints: Path) -> str:
    """Return the SHA-256 of everything in the newest checkpoint that is learned."""
    newest = load_latest(checkpoints)
    assert newest is not None
    assert newest.rounds == list_checkpoints(checkpoints)[-1]
    digest = hashlib.sha256(str(newest.rounds).encode())
    for learner, tensors in sorted(newest.learners.items()):
        for name, tensor in sorted(tensors.items()):
            digest.update(f"{learner}/{name}".encode())
            digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()
