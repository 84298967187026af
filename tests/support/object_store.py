"""A real S3 server on loopback."""

import contextlib
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx

PATIENCE = 200.0


class BucketServer(NamedTuple):
    """A running server with one bucket: the URL of a run's prefix, the options of a client, and the endpoint."""

    url: str
    options: dict[str, Any]
    endpoint: str


@contextlib.contextmanager
def running(log: Path, port: int = 0) -> Iterator[BucketServer]:
    """Start the server with one bucket; stop its process at the end."""
    port = port or free_port()
    endpoint = f"http://127.0.0.1:{port}"
    with log.open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)], stdout=output, stderr=output
        )
    try:
        make_bucket(endpoint, process, log)
        options = {
            "endpoint": endpoint,
            "allow_http": True,
            "region": "eu-central-1",
            "access_key_id": "tester",
            "secret_access_key": "secret",
        }
        yield BucketServer("s3://tasks/one-run", options, endpoint)
    finally:
        process.kill()
        process.wait()


def make_bucket(endpoint: str, process: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            assert httpx.put(f"{endpoint}/tasks", content=b"").status_code == 200
            return
        except httpx.TransportError:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
