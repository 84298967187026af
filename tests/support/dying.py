"""Functions for the processes that tests kill: they write and report what is done."""

import itertools
import os
import random
import signal
import sys
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from trainers.checkpoint import Checkpoint, save_checkpoint
from trainers.journal.jsonl import LineWriter


def checkpoint(rounds: int, floats: int = 3000) -> Checkpoint:
    """Return a checkpoint that is a function of its number of rounds."""
    random = torch.Generator().manual_seed(rounds)
    learners = {
        "ftml": {"weights.a": torch.randn(floats, generator=random), "weights.b": torch.randn((), generator=random)},
        "train_on_everything": {"weights.a": torch.randn(7, generator=random, dtype=torch.float64)},
        "from_scratch": {},
    }
    return Checkpoint(
        rounds, learners, {"seed": 1, "inner": {"lr": 0.1, "fast": ["*"]}, "model": {"args": {"é": None}}}
    )


def save_forever(folder: str, rounds: int, connection: Connection) -> None:
    """Save checkpoints one after the other from ``rounds`` + 1 on, and send the round of each saved one."""
    while True:
        rounds += 1
        save_checkpoint(Path(folder), checkpoint(rounds, 100_000), keep=2)
        connection.send(rounds)


def save_dying(folder: str, rounds: int, point: int, connection: Connection) -> None:
    """Save one checkpoint, and die just before the ``point``-th access to the file system."""
    left = point

    def count(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal left
        if event in ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree"):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    state = checkpoint(rounds)
    sys.addaudithook(count)
    save_checkpoint(Path(folder), state, keep=2)
    connection.send("survived")


def append_forever(path: str, seed: int, connection: Connection) -> None:
    """Append lines of 30 B to 300 kB forever, and report when the first is written."""
    chance, writer = random.Random(seed), LineWriter(Path(path))
    for number in itertools.count():
        writer.append({"number": number, "text": "é" * chance.choice((0, 10, 1000, 150_000)), "end": number})
        if number == 0:
            connection.send("begun")
