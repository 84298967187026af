"""Another machine that takes part in a served run: torchrun, in a network namespace of its own where root allows."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import psutil

from tests.support.launch_ranks import ROOT

NAME = f"om{os.getpid() % 100_000}"
HERE, THERE = (f"10.{64 + os.getpid() % 64}.{os.getpid() // 64 % 256}.{end}" for end in (1, 2))
"""Of this process alone: a run that was killed may have left its own."""


class Cable(NamedTuple):
    """How two machines reach each other: an address and a network interface of each, what the other is run with."""

    here: str
    there: str
    interface_here: str
    interface_there: str
    inside: tuple[str, ...]

    def pull(self, up: bool) -> None:
        """Cut the other machine off, or let it on again."""
        subprocess.run([*self.inside, "ip", "link", "set", self.interface_there, "up" if up else "down"], check=True)


LOOPBACK = Cable("127.0.0.1", "127.0.0.1", "lo", "lo", ())


def allowed() -> bool:
    """Return whether this user may make network namespaces."""
    try:
        made = subprocess.run(["ip", "netns", "add", f"{NAME}try"], capture_output=True, check=False)
    except FileNotFoundError:
        return False
    if made.returncode == 0:
        subprocess.run(["ip", "netns", "del", f"{NAME}try"], check=True)
    return made.returncode == 0


@contextmanager
def cable() -> Iterator[Cable]:
    """Lay a cable to a network namespace of its own, and take it up in the end."""
    own, other = f"{NAME}a", f"{NAME}b"
    inside = ("ip", "netns", "exec", NAME)
    steps = [
        ["ip", "netns", "add", NAME],
        ["ip", "link", "add", own, "type", "veth", "peer", "name", other, "netns", NAME],
        ["ip", "addr", "add", f"{HERE}/30", "dev", own],
        ["ip", "link", "set", own, "up"],
        [*inside, "ip", "addr", "add", f"{THERE}/30", "dev", other],
        [*inside, "ip", "link", "set", other, "up"],
        [*inside, "ip", "link", "set", "lo", "up"],
    ]
    try:
        for step in steps:
            subprocess.run(step, check=True)
        yield Cable(HERE, THERE, own, other, inside)
    finally:
        subprocess.run(["ip", "netns", "del", NAME], check=False)


class Node:
    """The other machine."""

    def __init__(self, folder: Path, config: str, port: int, by: Cable) -> None:
        """Start torchrun there, with a configuration in a folder of its own."""
        folder.mkdir(exist_ok=True)
        (folder / "config.toml").write_text(config)
        self.log = folder / "node.log"
        self.log.touch()
        command = [
            *by.inside,
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nnodes",
            "1:2",
            "--nproc-per-node",
            "1",
        ]
        command += ["--rdzv-backend", "c10d", "--rdzv-id", "online-meta", "--rdzv-endpoint", f"{by.here}:{port}"]
        command += ["--local-addr", by.there, "--max-restarts", "1000000", "-m", "deploy.processes.join", "config.toml"]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command,
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={
                    **os.environ,
                    "PYTHONPATH": str(ROOT),
                    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
                    "GLOO_SOCKET_IFNAME": by.interface_there,
                },
            )

    def joined(self) -> int:
        """Return how often it has taken part so far."""
        return self.log.read_text().count("the trainer continues at round")

    def die(self) -> None:
        """Lose power: everything there ends at once."""
        ranks = psutil.Process(self.process.pid).children(recursive=True)
        for process in (self.process, *ranks):
            process.send_signal(signal.SIGKILL)
        self.process.wait()
        psutil.wait_procs(ranks, 10)
