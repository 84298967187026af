"""A producer in its own process: tasks at an uneven rate, each recorded once it is acknowledged.

``python -m tests.soak.arriving http URL NAME NOTES STOP`` submits to a daemon. ``files FOLDER`` in place of
``http URL`` renames files into a spool; ``redis URL`` writes to a stream. The producer ends after the file STOP has
appeared.
"""

import json
import os
import random
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from streams.formats import wire
from streams.producers import connect, open_producer, submit
from streams.sources.sinusoid import make_task

MEAN_SECONDS = 0.5
FLURRY = 10
RETRY_SECONDS = 600.0


def body_of(id: str) -> bytes:
    """Return the task of an id, so that a check can tell whether a stored task is intact."""
    producer, _, number = id.rpartition("-")
    return wire.encode(make_task(sum(producer.encode()), int(number), 5, 5))


def pauses(seed: str) -> Iterator[float]:
    """Yield the seconds between tasks, at times 0."""
    chance = random.Random(seed)
    while True:
        if chance.random() < 0.02:
            yield from [0.0] * FLURRY
        yield chance.expovariate(1 / MEAN_SECONDS)


def submit_to(url: str) -> Callable[[str], dict[str, Any]]:
    """Return a function that submits the task of an id to a daemon, every fifth task twice."""
    client = connect(url, None)

    def send_task(id: str) -> dict[str, Any]:
        receipt = submit(url, id, body_of(id), client=client, retry_seconds=RETRY_SECONDS)
        if receipt.round % 5 == 0:
            again = submit(url, id, body_of(id), client=client, retry_seconds=RETRY_SECONDS)
            assert (again.round, again.duplicate) == (receipt.round, True), again
        return {"id": id, "round": receipt.round}

    return send_task


def drop_into(folder: Path) -> Callable[[str], dict[str, Any]]:
    """Return a function that writes the task of an id into a spool."""

    def send_task(id: str) -> dict[str, Any]:
        new = folder / f".{id}"
        new.write_bytes(body_of(id))
        new.rename(folder / f"{id}.safetensors")
        return {"id": id, "round": None}

    return send_task


def write_to(url: str) -> Callable[[str], dict[str, Any]]:
    """Return a function that writes the task of an id to a broker, retrying until it succeeds."""
    producer = open_producer(url, retry_seconds=RETRY_SECONDS)

    def send_task(id: str) -> dict[str, Any]:
        producer.send(id, body_of(id))
        return {"id": id, "round": None}

    return send_task


def main(kind: str, where: str, name: str, notes: str, stop: str) -> None:
    send_task = {"http": submit_to, "files": lambda folder: drop_into(Path(folder)), "redis": write_to}[kind](where)
    with open(notes, "a", encoding="utf-8") as said:
        for number, pause in enumerate(pauses(name)):
            said.write(json.dumps(send_task(f"{name}-{number}")) + "\n")
            said.flush()
            if os.path.exists(stop):
                return
            time.sleep(pause)


if __name__ == "__main__":
    main(*sys.argv[1:])
