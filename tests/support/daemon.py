"""A real daemon in a process of its own, for tests."""

import hashlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import torch

from deploy.config.config import read_config
from deploy.server.listener import check_exposure
from online_meta.types import Batch, Task
from streams.formats import wire
from streams.sources.sinusoid import make_task
from trainers.checkpoint import list_checkpoints, load_latest

ROOT = Path(__file__).parents[2]
START_SECONDS = 90.0
SECTIONS = """
[inner]
steps = 2
[meta]
batch = 2
[regret]
every_rounds = 5
hindsight_steps = 1
baselines = ["from_scratch"]
options.from_scratch = { steps = 2 }
[checkpoint]
every_rounds = 5
"""


def free_port() -> int:
    """Return a free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def sinusoid_config(run: Path, port: int, hidden: int | str = 8, sections: str = SECTIONS) -> str:
    """Return a configuration for the sinusoid stream: a small network, and the other ``sections`` as given.

    ``hidden`` is the width of its hidden layer; of several ones, the widths with commas between them.
    """
    return f"""
[run]
path = "{run}"
[task]
x_shape = [1]
y = "real"
y_shape = [1]
[model]
build = "trainers.models:mlp"
args = {{ inputs = 1, outputs = 1, hidden = [{hidden}] }}
loss = "mse"
{sections}
[serve]
port = {port}
"""


def write_sinusoid(folder: Path, more: str = "") -> Path:
    """Write a small configuration with its run under ``folder``; return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.toml"
    path.write_text(sinusoid_config(folder / "run", free_port()) + more)
    return path


def sinusoid(t: int, query: bool = True) -> bytes:
    """Return task t of the sinusoid stream as a body, with 5 support and 5 query samples."""
    task = make_task(0, t, 5, 5)
    if query:
        return wire.encode(task)
    return encode({"support_x": task.support.x, "support_y": task.support.y})


def encode(tensors: dict[str, torch.Tensor]) -> bytes:
    """Return named tensors as safetensors."""
    from safetensors.torch import save

    return save({name: tensor.clone() for name, tensor in tensors.items()})  # the format refuses shared memory


def decode(body: bytes) -> Task:
    """Return the task in a body of ``sinusoid``."""
    from safetensors.torch import load

    named = load(body)
    return Task(*(Batch(named[f"{part}_x"], named[f"{part}_y"]) for part in ("support", "query")))


def write_request(folder: Path, t: int) -> tuple[Path, Path]:
    """Write the support and query files of a task of the stream for ``adapt``; return their paths."""
    task = decode(sinusoid(t))
    support, query = folder / "support.safetensors", folder / "query.safetensors"
    support.write_bytes(encode({"support_x": task.support.x, "support_y": task.support.y}))
    query.write_bytes(encode({"query_x": task.query.x}))
    return support, query


PATIENCE = 200.0
"""Seconds until a wait has failed: on a busy machine a process with low priority takes a minute to start."""


def wait_for(what: str, true: Callable[[], Any], seconds: float = PATIENCE) -> Any:
    """Return the first true value of ``true``; fail if there is none in time."""
    deadline = time.monotonic() + seconds
    while not (value := true()):
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}"
        time.sleep(0.02)
    return value


@dataclass
class Daemon:
    """A daemon that listens at ``url``; ``client`` sends its token, and ``log`` is its stderr."""

    url: str
    process: "subprocess.Popen[bytes]"
    client: httpx.Client
    log: Path

    def child(self, name: str) -> psutil.Process:
        """Return the process of the trainer or of the comparators."""

        def find() -> psutil.Process | None:
            found = psutil.Process(self.process.pid).children()
            return next((child for child in found if f"deploy.processes.{name}" in child.cmdline()), None)

        child: psutil.Process = wait_for(f"the {name} runs", find)
        return child

    @contextmanager
    def paused(self, name: str) -> Iterator[None]:
        """Suspend a child with SIGSTOP for the duration of the block."""
        child = self.child(name)
        child.suspend()
        try:
            yield
        finally:
            child.resume()

    def submit(self, *tasks: int) -> list[httpx.Response]:
        """Submit tasks of the sinusoid stream with the ids sin-0, sin-1, ..."""
        return [self.post(sinusoid(t), f"sin-{t}") for t in tasks]

    def post(self, body: bytes, id: str | None = None) -> httpx.Response:
        """Post one task."""
        return self.client.post("/v1/tasks", content=body, headers={} if id is None else {"Idempotency-Key": id})

    def status(self) -> dict[str, Any]:
        """Return the daemon's status."""
        found: dict[str, Any] = self.client.get("/v1/status").json()
        return found

    def wait_until_learned(self, rounds: int, seconds: float = PATIENCE) -> dict[str, Any]:
        """Return the status as soon as ``rounds`` rounds are played."""

        def look() -> dict[str, Any] | None:
            status = self.status()
            return status if status["rounds"]["learned"] + status["rounds"]["skipped"] >= rounds else None

        found: dict[str, Any] = wait_for(f"{rounds} rounds are learned", look, seconds)
        return found

    def wait_until_compared(self, rounds: int) -> dict[str, Any]:
        """Return the status as soon as the hindsight comparator covers ``rounds`` rounds."""

        def look() -> dict[str, Any] | None:
            status = self.status()
            covered = status["regret"].get("hindsight", {"as_of_round": 0})["as_of_round"]
            return status if covered >= rounds else None

        found: dict[str, Any] = wait_for(f"hindsight covers {rounds} rounds", look)
        return found

    def drain(self) -> int:
        """Stop the daemon with SIGTERM; return its exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(120)


@contextmanager
def running_daemon(config: Path, *sets: str, verify: Any = True, program: str = "online_meta") -> Iterator[Daemon]:
    """Serve a configuration until the end of the block; yield the daemon once it responds.

    ``sets`` are ``--set`` arguments. ``verify`` is what httpx trusts if the daemon uses TLS. ``program`` is the module
    with the command line. The log is next to the configuration. Fails with the log if the daemon does not start.
    """
    settings = read_config(config, sets)
    token = check_exposure(settings.serve)
    log = config.with_suffix(".log")
    command = [sys.executable, "-m", program, "serve", str(config)]
    with open(log, "ab") as output:
        process = subprocess.Popen(
            [*command, *(part for one in sets for part in ("--set", one))], stdout=output, stderr=output, cwd=ROOT
        )
    url = f"{'https' if settings.serve.tls_cert else 'http'}://{settings.serve.host}:{settings.serve.port}"
    headers = {"Content-Type": "application/octet-stream"}
    headers |= {} if token is None else {"Authorization": f"Bearer {token}"}
    try:
        with httpx.Client(base_url=url, headers=headers, timeout=30.0, verify=verify, trust_env=False) as client:
            daemon = Daemon(url, process, client, log)
            wait_for("the daemon answers", lambda: process.poll() is not None or _answers(client), START_SECONDS)
            assert process.poll() is None, log.read_text()
            yield daemon
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _answers(client: httpx.Client) -> bool:
    try:
        return client.get("/healthz").is_success
    except httpx.TransportError:
        return False


def run_cli(*arguments: str | Path, seconds: float = 120.0, **environment: str) -> "subprocess.CompletedProcess[str]":
    """Run ``online-meta`` with these arguments in a separate process until it ends."""
    command = [sys.executable, "-m", "online_meta", *map(str, arguments)]
    variables = {**os.environ, **environment}
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=seconds, env=variables)


RESTARTED = """
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
"""


class RestartedDaemon:
    """A run and the daemon that serves it, which is restarted after a kill."""

    def __init__(
        self,
        folder: Path,
        together: int = 1,
        more: str = "",
        overrides: tuple[str, ...] = (),
        surroundings: dict[str, str] | None = None,
    ) -> None:
        """Write a configuration into ``folder``, with ``more`` sections, and start the daemon with ``overrides``.

        ``surroundings`` are the environment variables of the daemon; by default those of this process.
        """
        self.surroundings = surroundings
        self.overrides = [word for override in overrides for word in ("--set", override)]
        self.folder = folder
        self.run = folder / "run"
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.config = folder / "config.toml"
        folder.mkdir(parents=True, exist_ok=True)
        sections = RESTARTED.format(together=together)
        self.config.write_text(sinusoid_config(self.run, self.port, hidden=16, sections=sections) + more)
        self.start()

    def start(self) -> None:
        """Start the daemon and wait until it answers."""
        with open(self.folder / "daemon.log", "ab") as log:
            command = [sys.executable, "-m", "online_meta", "serve", str(self.config), *self.overrides]
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=self.surroundings)
        wait_for("the daemon answers", lambda: self.process.poll() is not None or self.answers())
        assert self.process.poll() is None, (self.folder / "daemon.log").read_text()

    def answers(self) -> bool:
        """Return whether the daemon is alive."""
        try:
            return httpx.get(f"{self.url}/healthz", timeout=5).is_success
        except httpx.TransportError:
            return False

    def children(self, name: str) -> list[int]:
        """Return the process ids of the daemon's children with that name."""
        try:
            found = psutil.Process(self.process.pid).children()
            return [child.pid for child in found if f"deploy.processes.{name}" in child.cmdline()]
        except psutil.NoSuchProcess:
            return []

    def rank(self, number: int) -> int | None:
        """Return the process id of a live rank of the trainer, or None."""
        for agent in self.children("ranks"):
            try:
                for child in psutil.Process(agent).children():
                    if child.environ().get("RANK") == str(number) and child.status() != psutil.STATUS_ZOMBIE:
                        return child.pid
            except psutil.Error:  # The process has just ended.
                continue
        return None

    def kill(self, name: str) -> bool:
        """Kill the daemon or one of its children; return whether it was alive. A killed daemon is restarted."""
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
        """Stop the daemon with SIGTERM; return its exit code."""
        self.process.terminate()
        return self.process.wait(120)

    def hash(self) -> str:
        """Return the SHA-256 of the parameters and optimizer states of all learners in the newest checkpoint."""
        return hash_of(self.run / "checkpoints")


def hash_of(checkpoints: Path) -> str:
    """Return the SHA-256 of everything learned in the newest checkpoint."""
    newest = load_latest(checkpoints)
    assert newest is not None
    assert newest.rounds == list_checkpoints(checkpoints)[-1]
    digest = hashlib.sha256(str(newest.rounds).encode())
    for learner, tensors in sorted(newest.learners.items()):
        for name, tensor in sorted(tensors.items()):
            digest.update(f"{learner}/{name}".encode())
            digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()
