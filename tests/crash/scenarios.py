"""Small lives of a history. Each acknowledges a step once it is durable."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from streams.formats import wire
from streams.history.history import History
from streams.history.retention import RetentionSettings, compact, subsample
from streams.history.sealing import SealingSettings, evict_payloads, remove_orphans, seal_next
from streams.types import Conflict, Record

Acknowledge = Callable[[dict[str, Any]], None]
Play = Callable[[Path, Acknowledge], None]
SIZES = (1, 40, 700, 3)
GROUP = 1000
"""The number from which tasks are larger and of other sources: 1000 to 1999 is a group, 2000 to 2999 the next.

Tasks of the first, the third and so on have named tensors and weights.
"""
SEALING = SealingSettings(segment_rounds=4, ledger_bytes=0)


def payload_of(number: int) -> bytes:
    """Return the task of a number. It is a pure function, so any process can compare; some exceed a ledger page."""
    random = np.random.default_rng(number)
    n = SIZES[number % len(SIZES)] * (1 + number // GROUP % 10)
    if number // GROUP % 2:
        return save(_named_tensors(random, n))
    tensors = {
        "support_x": random.standard_normal((n, 7)).astype("f4"),
        "support_y": np.zeros(n, "i8"),
        "query_x": random.standard_normal((2, 7)).astype("f4"),
        "query_y": np.zeros(2, "i8"),
    }
    return save(tensors)


def _named_tensors(random: np.random.Generator, n: int) -> dict[str, np.ndarray[Any, Any]]:
    """Return a task of two inputs and two targets with weights."""
    found: dict[str, np.ndarray[Any, Any]] = {}
    for part, size in (("support", n), ("query", 2)):
        found |= {
            f"{part}_x.mask": np.ones((size, 3), "u1"),
            f"{part}_x.values": random.standard_normal((size, 7)).astype("f4"),
            f"{part}_y.class": np.zeros((size, 3), "i8"),
            f"{part}_y.score": random.standard_normal(size).astype("f4"),
            f"{part}_weight": np.ones(size, "f4"),
        }
    return found


def record_of(number: int) -> Record:
    """Return the record of a number. Each group has two sources, of which one has positions."""
    payload = payload_of(number)
    cursor = str(number) if number % 2 == 0 else None
    return Record(f"task-{number}", payload, wire.digest(payload), source_of(number), cursor, 1000.0 + number)


def source_of(number: int) -> str:
    """Return the source of a number."""
    return ("even", "odd")[number % 2] + (str(number // GROUP) if number >= GROUP else "")


def append(history: History, numbers: list[int], acknowledge: Acknowledge) -> None:
    answers = history.append([record_of(number) for number in numbers])
    for number, answer in zip(numbers, answers, strict=True):
        assert not isinstance(answer, Conflict)
        acknowledge({"number": number, "round": answer.round})


def ingest(folder: Path, acknowledge: Acknowledge) -> None:
    """Run group commits, duplicates, a conflict, and a writer that is closed and reopened."""
    with History.open(folder, write=True) as history:
        append(history, [0, 1, 2], acknowledge)
        append(history, [2, 3], acknowledge)
        (answer,) = history.append([record_of(1)._replace(digest=b"?" * 32)])
        assert isinstance(answer, Conflict)
        append(history, list(range(4, 10)), acknowledge)
    with History.open(folder, write=True) as history:
        append(history, [5, 10, 11], acknowledge)
        for number in range(12, 16):
            append(history, [number], acknowledge)


def seal(folder: Path, acknowledge: Acknowledge) -> None:
    """Move rounds into the archive and evict them from the ledger while others arrive."""
    with History.open(folder, write=True) as history:
        remove_orphans(history)
        append(history, list(range(9)), acknowledge)
        seal_next(history, SEALING)
        evict_payloads(history, 0)
        append(history, [9, 10], acknowledge)
        seal_next(history, SEALING)
        evict_payloads(history, 0)


def keep(folder: Path, acknowledge: Acknowledge) -> None:
    """Make three sealed segments that only the archive holds."""
    with History.open(folder, write=True) as history:
        append(history, list(range(12)), acknowledge)
        while seal_next(history, SEALING):
            pass
        evict_payloads(history, 0)


def retain(folder: Path, acknowledge: Acknowledge) -> None:
    """Subsample sealed rounds and compact their segments."""
    with History.open(folder, write=True) as history:
        remove_orphans(history)
        subsample(history, RetentionSettings(rounds=3))
        append(history, [12], acknowledge)
        compact(history, 12, 4)
        append(history, [13], acknowledge)


def recover(folder: Path, acknowledge: Acknowledge) -> None:
    """Start as the daemon does; append a repeated and a new task."""
    with History.open(folder, write=True) as history:
        remove_orphans(history)
        append(history, [1, 9001], acknowledge)
