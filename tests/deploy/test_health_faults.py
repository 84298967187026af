"""Real faults of a running daemon: each turns exactly its check, in every face, and the check turns back.

``pytest -n0 -s tests/deploy/test_health_faults.py`` prints the table of faults: lines that begin with ``|``.
"""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import torch

from tests.deploy.conftest import Cli
from tests.deploy.fill_disk import fill
from tests.deploy.test_archive import SEALING, count_sealed_only, section
from tests.deploy.test_start import can_mount
from tests.support.brokers import Broker
from tests.support.daemon import (
    ROOT,
    Daemon,
    decode,
    encode,
    free_port,
    running_daemon,
    sinusoid,
    wait_for,
    write_sinusoid,
)
from tests.support.object_store import running
from tests.support.proxy import Proxy

Unwell = dict[str, str]
"""The levels of the checks that are not ok."""
ALONE = ("regret.comparator=[]", "regret.baselines=[]")


def read_unwell(client: httpx.Client) -> Unwell:
    found = client.get("/v1/health").json()
    return {check["name"]: check["level"] for check in found["checks"] if check["level"] != "ok"}


def wait_until_well(daemon: Daemon) -> None:
    wait_for("every check is ok", lambda: not read_unwell(daemon.client))


class Watched:
    """Waits for levels of one check, and fails if another check turns meanwhile."""

    def __init__(self, daemon: Daemon, fault: str, check: str, *others: str) -> None:
        """Watch ``check``; ``others`` may turn before it, for the same fault."""
        self.daemon, self.fault, self.check, self.others = daemon, fault, check, others
        self.began = time.monotonic()

    def wait_until(self, level: str) -> float:
        """Return the seconds from the last call, or from the start, until the check has a level."""

        def reached() -> bool:
            found = read_unwell(self.daemon.client)
            assert found.keys() <= {self.check, *self.others}, f"{self.fault}: {found}"
            return found.get(self.check, "ok") == level

        wait_for(f"{self.fault}: {self.check} is {level}", reached)
        began, self.began = self.began, time.monotonic()
        return self.began - began


def inject(
    daemon: Daemon, fault: str, turn: tuple[str, str], break_it: Callable[[], Any], mend: Callable[[], Any]
) -> None:
    """Break something, wait until its check turns, mend it, wait until the check turns back, and print a row."""
    wait_until_well(daemon)
    break_it()
    watched = Watched(daemon, fault, turn[0])
    turned = watched.wait_until(turn[1])
    mend()
    watched.began = time.monotonic()
    back = watched.wait_until("ok")
    wait_until_well(daemon)
    # The fixture `cli` reads what is printed to sys.stdout.
    print(f"| {fault} | {turn[0]} | {turn[1]} | {turned:.1f} s | {back:.1f} s |", file=sys.__stdout__, flush=True)


def nothing() -> None:
    """The daemon mends it itself."""


@contextlib.contextmanager
def idle_connections(port: int, count: int) -> Iterator[None]:
    """Hold connections on which nothing is sent."""
    with contextlib.ExitStack() as stack:
        for _ in range(count):
            stack.enter_context(socket.create_connection(("127.0.0.1", port)))
        yield


def assert_every_face_shows(daemon: Daemon, probes: str, cli: Cli, check: str) -> None:
    """Compare what every face says while ``check`` fails."""
    answer = httpx.get(f"{probes}/readyz", trust_env=False)
    assert (answer.status_code, answer.json()["failing"]) == (503, [check])
    assert answer.json()["detail"].startswith(f"{check}: ")
    assert daemon.client.get("/readyz").json() == answer.json()
    codes = {
        of: httpx.get(f"{probes}/readyz?of={of}", trust_env=False).status_code
        for of in ("ingest", "answers", "learning")
    }
    assert codes == {"ingest": 200, "answers": 200, "learning": 503}
    assert f'online_meta_health{{check="{check}"}} 2.0' in httpx.get(f"{probes}/metrics", trust_env=False).text
    status = daemon.status()
    assert (status["health"]["level"], status["state"], status["trainer"]["alive"]) == ("fail", "trainer_down", False)
    printed = cli("status", "--url", daemon.url).out
    assert f"FAILS: {check}" in printed
    assert "DOWN, " in printed


def test_a_killed_and_a_stopped_trainer_turn_its_check_in_every_face(tmp_path: Path, cli: Cli) -> None:
    port = free_port()
    probes = f"http://127.0.0.1:{port}"
    config = write_sinusoid(tmp_path, f'probes = "127.0.0.1:{port}"\n')
    with running_daemon(config, *ALONE) as daemon:
        daemon.submit(*range(3))
        daemon.wait_until_learned(3)
        inject(daemon, "trainer killed", ("trainer", "fail"), lambda: daemon.child("trainer").kill(), nothing)
        trainer = daemon.child("trainer")

        def mend() -> None:
            assert_every_face_shows(daemon, probes, cli, "trainer")
            assert daemon.submit(3)[0].status_code == 201
            with idle_connections(httpx.URL(daemon.url).port, 600):
                with pytest.raises((httpx.HTTPStatusError, httpx.TransportError)):
                    httpx.get(f"{daemon.url}/healthz", trust_env=False, timeout=5).raise_for_status()
                assert httpx.get(f"{probes}/healthz", trust_env=False).json() == {"status": "alive"}
                assert httpx.get(f"{probes}/readyz", trust_env=False).status_code == 503
                assert httpx.get(f"{probes}/v1/status", trust_env=False).status_code == 404
            trainer.resume()

        inject(daemon, "trainer stopped (SIGSTOP)", ("trainer", "fail"), trainer.suspend, mend)
        daemon.wait_until_learned(4)
        assert httpx.get(f"{probes}/readyz", trust_env=False).json() == {"status": "ready"}
        assert daemon.drain() == 0


def test_a_hanging_trainer_is_killed_and_restarted(tmp_path: Path) -> None:
    with running_daemon(write_sinusoid(tmp_path), *ALONE, "engine.timeout_seconds=4") as daemon:
        daemon.submit(*range(3))
        daemon.wait_until_learned(3)
        trainer = daemon.child("trainer")
        inject(daemon, "trainer stopped for good", ("trainer", "fail"), trainer.suspend, nothing)
        assert not trainer.is_running()
        daemon.submit(3)
        daemon.wait_until_learned(4)
        assert "has not reported for" in daemon.log.read_text()


def test_dead_comparators_turn_their_check(tmp_path: Path) -> None:
    with running_daemon(write_sinusoid(tmp_path)) as daemon:
        daemon.submit(*range(3))
        daemon.wait_until_learned(3)
        kill = lambda: daemon.child("comparators").kill()  # noqa: E731
        inject(daemon, "comparators killed", ("comparators", "warn"), kill, nothing)


@pytest.mark.parametrize("kind", ["redis", "kafka", "nats"])
def test_a_broker_that_is_gone_turns_the_check_of_its_source(tmp_path: Path, kind: str) -> None:
    broker = Broker(kind, tmp_path / "broker")
    try:
        broker.make_stream("tasks")
        options = "".join(f"{name} = {json.dumps(value)}\n" for name, value in broker.options("tasks").items())
        source = f'[[source]]\nkind = "{kind}"\nname = "queue"\n{options}'
        with running_daemon(write_sinusoid(tmp_path / "run", source), *ALONE) as daemon:
            inject(daemon, f"{kind} gone", ("source:queue", "fail"), broker.network.cut, broker.network.heal)
            ready = daemon.client.get("/readyz?of=ingest")
            assert ready.status_code == 200
    finally:
        broker.close()


def test_an_archive_that_is_gone_turns_its_check(tmp_path: Path) -> None:
    config, archive = write_sinusoid(tmp_path / "folder", SEALING), tmp_path / "folder/run/history/archive"
    with running_daemon(config, *ALONE) as daemon:
        daemon.submit(*range(6))
        daemon.wait_until_learned(6)
        wait_for("rounds are sealed", lambda: count_sealed_only(archive.parent) == 5)
        away = archive.with_name("away")
        inject(
            daemon,
            "folder of the archive gone",
            ("archive", "warn"),
            lambda: archive.rename(away),
            lambda: away.rename(archive),
        )
    network = Proxy()
    with running(tmp_path / "s3.log") as server:
        network.to = httpx.URL(server.endpoint).port
        options = {"endpoint": f"http://127.0.0.1:{network.port}"}
        with running_daemon(write_sinusoid(tmp_path / "s3", section(server, **options) + SEALING), *ALONE) as daemon:
            daemon.submit(*range(6))
            daemon.wait_until_learned(6)
            wait_for("rounds are sealed", lambda: count_sealed_only(tmp_path / "s3/run/history") == 5)
            inject(daemon, "object store gone", ("archive", "warn"), network.swallow, network.heal)
    network.close()


CRASHING = """
import os, signal, sys
from torch import nn
from trainers.models import mlp

class Crashing(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = mlp(inputs=1, outputs=1, hidden=[8])
    def forward(self, x):
        if "deploy.processes.trainer" in " ".join(sys.orig_argv) and x.abs().max() > 50:
            os.kill(os.getpid(), signal.SIGKILL)
        return self.model(x)

def build():
    return Crashing()
"""


def test_a_task_that_ends_the_trainer_turns_restarts_until_it_is_in_quarantine(tmp_path: Path) -> None:
    (tmp_path / "crashing.py").write_text(CRASHING)
    config = write_sinusoid(tmp_path)
    text = config.read_text().replace('"trainers.models:mlp"', '"crashing:build"')
    config.write_text("\n".join(line for line in text.splitlines() if not line.startswith("args =")) + "\n")
    with running_daemon(config, *ALONE, "engine.batching=loop") as daemon:
        daemon.submit(*range(3))
        daemon.wait_until_learned(3)
        wait_until_well(daemon)
        task = decode(sinusoid(3))
        support_x = torch.full_like(task.support.x, 60.0)
        tensors = {
            "support_x": support_x,
            "support_y": task.support.y,
            "query_x": task.query.x,
            "query_y": task.query.y,
        }
        assert daemon.post(encode(tensors), "poison").status_code == 201
        watched = Watched(daemon, "the trainer ends at the same round twice", "restarts", "trainer", "quarantine")
        turned = watched.wait_until("fail")
        back = watched.wait_until("ok")
        print(f"| a task ends the trainer twice | restarts | fail | {turned:.1f} s | {back:.1f} s (quarantine) |")
        assert daemon.client.get("/v1/tasks/poison").json()["status"] == "quarantined"
        daemon.submit(4)
        daemon.wait_until_learned(4)
        wait_for("only the quarantine is left", lambda: read_unwell(daemon.client) == {"quarantine": "warn"})


RANKS = """
[engine]
kind = "deepspeed"
processes = 2
batching = "loop"
"""


def find_rank(daemon: Daemon, number: int) -> psutil.Process:
    """Return the process of a rank."""

    def find() -> psutil.Process | None:
        with contextlib.suppress(psutil.Error):
            ranks = daemon.child("ranks").children()
            return next((rank for rank in ranks if rank.environ().get("RANK") == str(number)), None)
        return None

    rank: psutil.Process = wait_for(f"rank {number} runs", find)
    return rank


@pytest.mark.timeout(600)
def test_a_killed_and_a_stopped_rank_turn_the_check_of_the_trainer(tmp_path: Path) -> None:
    with running_daemon(write_sinusoid(tmp_path, RANKS), *ALONE) as daemon:
        daemon.submit(*range(3))
        daemon.wait_until_learned(3)
        kill = lambda: find_rank(daemon, 1).kill()  # noqa: E731
        inject(daemon, "rank 1 of 2 killed", ("trainer", "fail"), kill, nothing)
        daemon.submit(3)
        daemon.wait_until_learned(4)
        for number in (0, 1):
            rank = find_rank(daemon, number)

            def stop(rank: psutil.Process = rank, task: int = 4 + number) -> None:
                rank.suspend()
                assert daemon.submit(task)[0].status_code == 201

            def resume(rank: psutil.Process = rank) -> None:
                with contextlib.suppress(psutil.NoSuchProcess):  # The agent may have replaced it already.
                    rank.resume()

            inject(daemon, f"rank {number} of 2 stopped (SIGSTOP)", ("trainer", "fail"), stop, resume)
            daemon.wait_until_learned(5 + number)
        assert daemon.status()["trainer"]["restarts"] >= 1
        assert daemon.drain() == 0


DIVERGING = """
from pathlib import Path
import torch
from torch import nn
from trainers.models import mlp

class Diverging(nn.Module):
    def __init__(self, switch):
        super().__init__()
        self.model, self.switch = mlp(inputs=1, outputs=1, hidden=[8]), Path(switch)
    def forward(self, x):
        y = self.model(x)
        return y * torch.inf if self.switch.exists() else y

def build(switch):
    return Diverging(switch)
"""


def test_a_run_that_diverges_turns_its_check(tmp_path: Path) -> None:
    (tmp_path / "diverging.py").write_text(DIVERGING)
    switch, config = tmp_path / "switch", write_sinusoid(tmp_path)
    text = config.read_text().replace('"trainers.models:mlp"', '"diverging:build"')
    lines = [f'args = {{ switch = "{switch}" }}' if line.startswith("args =") else line for line in text.splitlines()]
    config.write_text("\n".join(lines) + "\n")
    with running_daemon(config, *ALONE, "engine.batching=loop", "meta.max_skipped=5") as daemon:
        daemon.submit(*range(30))
        daemon.wait_until_learned(30)

        def diverge() -> None:
            switch.touch()
            daemon.submit(*range(30, 60))

        def mend() -> None:
            switch.unlink()
            daemon.submit(*range(60, 200))

        inject(daemon, "diverged (no finite loss)", ("divergence", "fail"), diverge, mend)
        daemon.wait_until_learned(200)
        assert "the leader is rolled back to its state" in daemon.log.read_text()


def fill_and_free(config: Path, run: Path) -> None:
    """Fill the disk of a run while its daemon runs, then free it; the run's folder is a small disk."""
    with running_daemon(config, *ALONE, "checkpoint.every_rounds=2") as daemon:
        daemon.submit(*range(4))
        daemon.wait_until_learned(4)

        def break_it() -> None:
            fill(run / "filler")
            assert daemon.submit(*range(4, 6))[0].status_code == 507

        inject(daemon, "disk full", ("disk", "fail"), break_it, (run / "filler").unlink)
        assert daemon.submit(4)[0].status_code == 201
        daemon.wait_until_learned(5)


@pytest.mark.skipif(not can_mount(), reason="no private mounts here (unshare -rm): no disk that is really full")
def test_a_full_disk_turns_its_check(tmp_path: Path) -> None:
    config, run = write_sinusoid(tmp_path), tmp_path / "run"
    run.mkdir()
    script = 'mount -t tmpfs -o size=6m tmpfs "$1" && exec "$2" -m tests.deploy.test_health_faults "$3" "$1"'
    command = ["unshare", "-rm", "sh", "-c", script, "sh", str(run), sys.executable, str(config)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=280)
    assert done.returncode == 0, f"{done.stderr}\n{config.with_suffix('.log').read_text()}"
    print(done.stdout)


if __name__ == "__main__":
    fill_and_free(Path(sys.argv[1]), Path(sys.argv[2]))
