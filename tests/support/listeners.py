"""Print at which addresses a process and its descendants listen: ``python -m tests.support.listeners PID``."""

import json
import socket
import subprocess
import sys
from typing import NamedTuple

import psutil


class Listener(NamedTuple):
    """A socket that anyone who reaches its address can send to; ``process`` is the Python module that has it."""

    process: str
    protocol: str
    address: str
    port: int


def list_listeners(pid: int) -> set[Listener]:
    """Return the listening TCP sockets and the UDP sockets without a peer, of a process and all its descendants."""
    found = set()
    try:
        parent = psutil.Process(pid)
        processes = [parent, *parent.children(recursive=True)]
    except psutil.NoSuchProcess:
        return found
    for process in processes:
        try:
            name = _name(process.cmdline())
            if not name:  # It is ending.
                continue
            for one in process.net_connections("inet"):
                if one.status == psutil.CONN_LISTEN:
                    found.add(Listener(name, "tcp", *one.laddr))
                elif one.type == socket.SOCK_DGRAM and one.laddr and not one.raddr:
                    found.add(Listener(name, "udp", *one.laddr))
        except psutil.Error:  # It has just ended.
            continue
    return found


def list_listeners_inside(command: tuple[str, ...], pid: int) -> set[Listener]:
    """Return the listeners of a process in the network namespace that the prefix ``command`` enters."""
    program = [*command, sys.executable, "-m", "tests.support.listeners", str(pid), "--json"]
    return {Listener(*one) for one in json.loads(subprocess.run(program, check=True, capture_output=True).stdout)}


def _name(command: list[str]) -> str:
    return command[command.index("-m") + 1] if "-m" in command else " ".join(command)


if __name__ == "__main__":
    listeners = sorted(list_listeners(int(sys.argv[1])))
    if "--json" in sys.argv:
        sys.stdout.write(json.dumps(listeners))
    else:
        sys.stdout.writelines(f"{one.protocol} {one.address}:{one.port} {one.process}\n" for one in listeners)
