"""What a killed process was doing: small lives of a history, each step acknowledged when it is durable."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from streams import wire
from streams.arrivals import Conflict, Record
from streams.history import History
from streams.retention import RetentionSettings, thin
from streams.sealing import SealingSettings, relieve_ledger, seal_next, tidy
from streams.sweeping import sweep

Acknowledge = Callable[[dict[str, Any]], None]
Scenario = Callable[[Path, Acknowledge], None]
SIZES = (1, 40, 700, 3)
SEALING = SealingSettings(segment_rounds=4, ledger_bytes=0)


def payload_of(number: int) -> bytes:
    """The task of a number, some larger than a page of the ledger; a pure function, so that anybody can compare."""
    random = np.random.default_rng(number)
    n = SIZES[number % len(SIZES)]
    tensors = {
        "support_x": random.standard_normal((n, 7)).astype("f4"),
        "support_y": np.zeros(n, "i8"),
        "query_x": random.standard_normal((2, 7)).astype("f4"),
        "query_y": np.zeros(2, "i8"),
    }
    return save(tensors)


def record_of(number: int) -> Record:
    """The record of a number, of one of two sources, one of which has positions."""
    payload = payload_of(number)
    source, cursor = ("even", str(number)) if number % 2 == 0 else ("odd", None)
    return Record(f"task-{number}", payload, wire.digest(payload), source, cursor, 1000.0 + number)


def append(history: History, numbers: list[int], acknowledge: Acknowledge) -> None:
    answers = history.append([record_of(number) for number in numbers])
    for number, answer in zip(numbers, answers, strict=True):
        assert not isinstance(answer, Conflict)
        acknowledge({"number": number, "round": answer.round})


def ingest(folder: Path, acknowledge: Acknowledge) -> None:
    """Group commits, duplicates, a conflict, and a writer that is closed and opened again."""
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
    """Rounds go into the archive and leave the ledger, while others arrive."""
    with History.open(folder, write=True) as history:
        tidy(history)
        append(history, list(range(9)), acknowledge)
        seal_next(history, SEALING)
        relieve_ledger(history, 0)
        append(history, [9, 10], acknowledge)
        seal_next(history, SEALING)
        relieve_ledger(history, 0)


def retain(folder: Path, acknowledge: Acknowledge) -> None:
    """Sealed rounds are thinned out, and segments are written anew without them."""
    with History.open(folder, write=True) as history:
        tidy(history)
        append(history, list(range(12)), acknowledge)
        while seal_next(history, SEALING):
            pass
        relieve_ledger(history, 0)
        thin(history, RetentionSettings(rounds=3))
        append(history, [12], acknowledge)
        sweep(history, 12, 4)
        append(history, [13], acknowledge)


SCENARIOS: dict[str, Scenario] = {"ingest": ingest, "seal": seal, "retain": retain}


def numbers_in(history: History) -> Iterator[tuple[int, int]]:
    """Give (round, number) of all rounds."""
    for round in range(len(history)):
        yield round, int(history.entry(round).id.removeprefix("task-"))
