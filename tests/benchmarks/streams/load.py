"""``python -m tests.benchmarks.streams.load URL SECONDS CLIENTS NAME [KIND]``: generate load with little CPU time.

NAME makes the ids of the tasks unique to this run. KIND is "images" (the default), "small" or "json". One thread holds
all connections, and sends a new request on each as soon as the response has arrived. The tasks are created in advance.
Prints the seconds from each request to its response as JSON.
"""

import json
import selectors
import socket
import sys
import time
from dataclasses import dataclass
from itertools import count
from urllib.parse import urlsplit

import torch

from online_meta.types import Batch, Task
from streams.formats import wire
from streams.formats.json_body import tensors_to_json

BODIES = 64
INPUTS = 8
SAMPLES, SIDE, WAYS = 8, 16, 4  # 2 x 8 x 16 x 16 floats: 16 KiB


@dataclass
class Client:
    """A connection, the time of its last request, and the part of the response received so far."""

    link: socket.socket
    asked: float = 0.0
    answer: bytes = b""


def make_bodies() -> list[bytes]:
    """Return tasks of 16 KiB."""
    random = torch.Generator().manual_seed(0)
    labels = torch.arange(SAMPLES) % WAYS

    def batch() -> Batch:
        return Batch(torch.randn(SAMPLES, 1, SIDE, SIDE, generator=random), labels)

    return [wire.encode(Task(batch(), batch())) for _ in range(BODIES)]


def make_small_tasks() -> list[Task]:
    """Return tasks of 5 support and 5 query samples with 8 inputs and 1 target each."""
    random = torch.Generator().manual_seed(0)

    def batch() -> Batch:
        return Batch(torch.randn(5, INPUTS, generator=random), torch.randn(5, 1, generator=random))

    return [Task(batch(), batch()) for _ in range(BODIES)]


def to_json(task: Task) -> bytes:
    """Return a task as JSON with 7 digits, which is what float32 holds."""
    return json.dumps(tensors_to_json(wire.encode(task))).encode()


KINDS = {
    "images": (make_bodies, "application/octet-stream"),
    "small": (lambda: [wire.encode(task) for task in make_small_tasks()], "application/octet-stream"),
    "json": (lambda: [to_json(task) for task in make_small_tasks()], "application/json"),
}


def run_load(host: str, port: int, seconds: float, clients: int, name: str, kind: str = "images") -> list[float]:
    """Return the seconds until the response 201 for each task; raises ``RuntimeError`` for any other response."""
    make, media_type = KINDS[kind]
    sent, numbers = make(), count()
    selector = selectors.DefaultSelector()

    def ask(client: Client) -> None:
        number = next(numbers)
        body = sent[number % len(sent)]
        head = f"POST /v1/tasks HTTP/1.1\r\nHost: {host}\r\nIdempotency-Key: {name}-{number}\r\n"
        head += f"Content-Type: {media_type}\r\n"
        client.asked, client.answer = time.perf_counter(), b""
        client.link.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)

    waiting = [Client(socket.create_connection((host, port))) for _ in range(clients)]
    for client in waiting:
        client.link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        selector.register(client.link, selectors.EVENT_READ, client)
        ask(client)
    taken: list[float] = []
    ends, open_clients = time.perf_counter() + seconds, clients
    while open_clients:
        for key, _ in selector.select():
            client = key.data
            client.answer += client.link.recv(65536)
            if not client.answer.endswith(b"}"):  # The response is one flat JSON object.
                continue
            now = time.perf_counter()
            if not client.answer.startswith(b"HTTP/1.1 201"):
                raise RuntimeError(f"the response was {client.answer.decode()}")
            taken.append(now - client.asked)
            if now < ends:
                ask(client)
            else:
                open_clients -= 1
                selector.unregister(client.link)
                client.link.close()
    return taken


if __name__ == "__main__":
    url = urlsplit(sys.argv[1])
    began = time.perf_counter()
    found = run_load(url.hostname or "", url.port or 80, float(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:6])
    print(json.dumps({"seconds": time.perf_counter() - began, "taken": found, "cpu": time.process_time()}))
