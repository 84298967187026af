"""Start a process that reports over a connection, and kill it."""

import multiprocessing
import os
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

START = multiprocessing.get_context("forkserver")
START.set_forkserver_preload(["tests.support.dying"])


def start(target: Callable[..., None], *arguments: object) -> tuple[multiprocessing.Process, Connection]:
    """Start ``target(*arguments, connection)``; return the process and the receiving end."""
    here, there = START.Pipe(duplex=False)
    process = START.Process(target=target, args=(*arguments, there), daemon=True)
    process.start()
    there.close()
    return process, here


def receive_all(connection: Connection) -> list[Any]:
    """Return everything that is sent until the process ends."""
    received = []
    try:
        while True:
            received.append(connection.recv())
    except (EOFError, OSError):
        return received


def kill(process: multiprocessing.Process) -> None:
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
