"""A producer in a process of its own: tasks at an uneven rate, each noted once it is acknowledged.

``python -m tests.soak.arriving http URL NAME NOTES STOP`` submits to a daemon; with ``files FOLDER`` in the place of
``http URL`` it renames files into a spool, with ``redis URL`` it writes to a stream. It ends, whatever it was at, after
the file STOP has appeared.
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
PATIENCE = 600.0


def body_of(id: str) -> bytes:
    """The task of an id, so that whoever finds it can tell whether it is whole."""
    producer, _, number = id.rpartition("-")
    return wire.encode(make_task(sum(producer.encode()), int(number), 5, 5))


def pauses(seed: str) -> Iterator[float]:
    """Seconds between tasks: mostly some, at times none at all."""
    chance = random.Random(seed)
    while True:
        if chance.random() < 0.02:
            yield from [0.0] * FLURRY
        yield chance.expovariate(1 / MEAN_SECONDS)


def submit_to(url: str) -> Callable[[str], dict[str, Any]]:
    """Return what brings the task of an id to a daemon, every fifth of them twice."""
    client = connect(url, None)

    def bring(id: str) -> dict[str, Any]:
        receipt = submit(url, id, body_of(id), client=client, retry_seconds=PATIENCE)
        if receipt.round % 5 == 0:
            again = submit(url, id, body_of(id), client=client, retry_seconds=PATIENCE)
            assert (again.round, again.duplicate) == (receipt.round, True), again
        return {"id": id, "round": receipt.round}

    return bring


def drop_into(folder: Path) -> Callable[[str], dict[str, Any]]:
    """Return what puts the task of an id into a spool."""

    def bring(id: str) -> dict[str, Any]:
        new = folder / f".{id}"
        new.write_bytes(body_of(id))
        new.rename(folder / f"{id}.safetensors")
        return {"id": id, "round": None}

    return bring


def write_to(url: str) -> Callable[[str], dict[str, Any]]:
    """Return what writes the task of an id to a broker, as often as it takes."""
    producer = open_producer(url, retry_seconds=PATIENCE)

    def bring(id: str) -> dict[str, Any]:
        producer.send(id, body_of(id))
        return {"id": id, "round": None}

    return bring


def main(kind: str, where: str, name: str, notes: str, stop: str) -> None:
    bring = {"http": submit_to, "files": lambda folder: drop_into(Path(folder)), "redis": write_to}[kind](where)
    with open(notes, "a", encoding="utf-8") as said:
        for number, pause in enumerate(pauses(name)):
            said.write(json.dumps(bring(f"{name}-{number}")) + "\n")
            said.flush()
            if os.path.exists(stop):
                return
            time.sleep(pause)


if __name__ == "__main__":
    main(*sys.argv[1:])
