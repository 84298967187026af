"""Create histories of generated streams, once for all algorithms that are compared on them."""

import time
from pathlib import Path
from typing import Any

import streams.sources
from online_meta import registry
from streams.formats import wire
from streams.history.history import History
from streams.spec import TaskSpec
from streams.types import Arrival, Record, TaskSource

COMMIT = 50


def make_history(folder: Path, kind: str, seed: int, rounds: int, **options: Any) -> Path:
    """Return the folder of a history with at least ``rounds`` tasks of the source ``kind``; append missing tasks."""
    if _count_rounds(folder) >= rounds:  # Some sources take seconds to open.
        return folder
    module = registry.load_module(streams.sources, kind)
    spec: TaskSpec = module.SPEC
    source: TaskSource = module.create_source(module.Settings(**options), spec, kind, seed)
    with History.open(folder, write=True) as history:
        records: list[Record] = []
        arrivals = source.read(after=history.cursor(kind))
        while len(history) + len(records) < rounds:
            arrival = next(arrivals)
            if arrival is not None:
                records.append(_make_record(arrival))
            if len(records) == COMMIT or len(history) + len(records) == rounds:
                history.append(records)
                records = []
    return folder


def _count_rounds(folder: Path) -> int:
    if not folder.exists():
        return 0
    with History.open(folder, write=False) as history:
        return len(history)


def _make_record(arrival: Arrival) -> Record:
    return Record(
        id=arrival.id,
        payload=arrival.body,
        digest=wire.digest(arrival.body),
        source=arrival.source,
        cursor=arrival.cursor,
        arrived=time.time(),
    )
