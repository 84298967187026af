"""The main job end to end: a daemon, a real stream through its front door, a summary."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from importlib.resources import files as package_files
from pathlib import Path
from typing import Any

import httpx

from deploy.config import Config, ServeSettings, read_config
from deploy.exits import BROKEN, TRY_LATER, CommandError, ConfigError
from deploy.listening import bind
from online_meta import registry
from streams.arrivals import TaskSource
from streams.producer import connect, submit

MAX_PENDING_TASKS = 12
"""How many tasks the demo's client keeps waiting at the daemon: enough to keep it busy, few enough to look live."""
START_SECONDS = 120.0
HINDSIGHT_SECONDS = 240.0


@dataclass(frozen=True)
class Demo:
    """A running demo: the daemon's process and a client of it."""

    daemon: "subprocess.Popen[bytes]"
    client: httpx.Client
    url: str


def demo_config(out: Path, port: int) -> tuple[Config, list[str]]:
    """Return the demo's configuration and the command that serves it."""
    path = Path(str(package_files("deploy") / "demo.toml"))
    overrides = (f"run.path={json.dumps(str(out))}", f"serve.port={port}")
    sets = [part for override in overrides for part in ("--set", override)]
    return read_config(path, overrides), [sys.executable, "-m", "online_meta", "serve", str(path), *sets]


@contextmanager
def start_daemon(command: list[str], url: str, log: Path) -> Iterator[Demo]:
    """Start the daemon and wait until it answers; drain it at the end. Raises ``CommandError`` with its last words."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "ab") as output:
        daemon = subprocess.Popen(command, stdout=output, stderr=output)
    try:
        with connect(url) as client:
            _wait_until_ready(daemon, client, log)
            yield Demo(daemon, client, url)
    finally:
        if daemon.poll() is None:
            daemon.terminate()
        code = daemon.wait()
    if code != 0:
        raise CommandError(BROKEN, f"the daemon ended with {code}; its last words are in {log}")


def _wait_until_ready(daemon: "subprocess.Popen[bytes]", client: httpx.Client, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        code = daemon.poll()
        if code is not None:
            raise CommandError(code or BROKEN, log.read_text(encoding="utf-8", errors="replace").strip()[-2000:])
        try:
            if client.get("/healthz").is_success:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    raise CommandError(TRY_LATER, f"the daemon did not answer within {START_SECONDS:.0f} s; see {log}")


def choose_port(port: int) -> int:
    """Return ``port``, or a free one for 0; raises ``CommandError`` (75) when it is taken: tasks would go to a stranger."""
    with closing(bind(ServeSettings(port=port))) as listener:
        chosen: int = listener.getsockname()[1]
        return chosen


def demo_source(config: Config, kind: str) -> TaskSource:
    """Return the demo's stream of tasks, which its client sends through the front door."""
    import streams.sources

    module = registry.load_module(streams.sources, kind)
    try:
        source: TaskSource = module.create_source(module.Settings(), config.task, kind, config.run.seed)
    except ImportError as error:
        raise ConfigError(f"the demo's digits are missing: pip install 'online-meta[digits]' ({error})") from error
    return source


def stream_tasks(demo: Demo, source: TaskSource, rounds: int) -> Iterator[dict[str, Any]]:
    """Submit ``rounds`` tasks, a few ahead of the trainer; yield the daemon's status until all are learned."""
    arrivals = source.read(after=None)
    sent = 0
    status = demo.client.get("/v1/status").json()
    while status["rounds"]["learned"] + status["rounds"]["skipped"] < rounds:
        capacity = min(rounds - sent, MAX_PENDING_TASKS - (sent - status["rounds"]["learned"]))
        for _ in range(capacity):
            arrival = next(arrivals)
            while arrival is None:
                arrival = next(arrivals)
            submit(demo.url, arrival.id, arrival.body, client=demo.client)
            sent += 1
        yield status
        time.sleep(0.25)
        if demo.daemon.poll() is not None:
            raise CommandError(BROKEN, "the daemon ended before all tasks were learned; its log says why")
        status = demo.client.get("/v1/status").json()
    yield status


def wait_for_hindsight(demo: Demo, rounds: int) -> Iterator[dict[str, Any]]:
    """Yield the daemon's status until the hindsight comparator covers all rounds, or patience ends."""
    deadline = time.monotonic() + HINDSIGHT_SECONDS
    while time.monotonic() < deadline:
        status = demo.client.get("/v1/status").json()
        yield status
        if status["regret"].get("hindsight", {"as_of_round": 0})["as_of_round"] >= rounds:
            return
        time.sleep(0.5)
