"""A second machine of a served run, in its own network namespace if this user may create one."""

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
"""Specific to this process, because a killed run may have left its own behind."""


class Cable(NamedTuple):
    """The connection of two machines: their addresses and network interfaces, and the command prefix of the other."""

    here: str
    there: str
    interface_here: str
    interface_there: str
    inside: tuple[str, ...]

    def pull(self, up: bool) -> None:
        """Disconnect the other machine, or connect it again."""
        subprocess.run([*self.inside, "ip", "link", "set", self.interface_there, "up" if up else "down"], check=True)


LOOPBACK = Cable("127.0.0.1", "127.0.0.1", "lo", "lo", ())


def can_create_namespaces() -> bool:
    """Return whether this user may create network namespaces."""
    try:
        made = subprocess.run(["ip", "netns", "add", f"{NAME}try"], capture_output=True, check=False)
    except FileNotFoundError:
        return False
    if made.returncode == 0:
        subprocess.run(["ip", "netns", "del", f"{NAME}try"], check=True)
    return made.returncode == 0


@contextmanager
def lay_cable() -> Iterator[Cable]:
    """Create a network namespace with a virtual cable to it, and delete it at the end."""
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
    """The second machine."""

    def __init__(self, folder: Path, config: str, by: Cable) -> None:
        """Start its ranks, with a configuration in its own folder."""
        folder.mkdir(exist_ok=True)
        (folder / "config.toml").write_text(config)
        self.log = folder / "node.log"
        self.log.touch()
        command = [*by.inside, sys.executable, "-m", "deploy.processes.join", "config.toml"]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command,
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
            )

    def joined(self) -> int:
        """Return how often it has joined so far."""
        return self.log.read_text().count("the trainer continues at round")

    def die(self) -> None:
        """Simulate a power loss: kill every process at once."""
        ranks = psutil.Process(self.process.pid).children(recursive=True)
        for process in (self.process, *ranks):
            process.send_signal(signal.SIGKILL)
        self.process.wait()
        psutil.wait_procs(ranks, 10)
