"""Seal rounds into the archive, in turn with zarr alone on the same arrays; read tasks from the archive."""

import random
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.codecs import Crc32cCodec, ZstdCodec

from streams.formats import wire
from streams.history.archive.columns import split_columns
from streams.history.archive.shards import CHUNK_BYTES, ZSTD_LEVEL
from streams.history.archive.stores import FolderStore
from streams.history.history import History
from streams.history.sealing import SealingSettings, evict_payloads, seal_next, select_rounds
from streams.types import Record
from tests.benchmarks.streams.figure import Figure, make_figure
from tests.benchmarks.works import image_task

TITLE = (
    "Sealing reads rounds from the ledger, writes, fsyncs, reads back, compares and publishes them; zarr alone "
    "writes the tensors without fsync; zarr with verification also fsyncs them, reads them back and compares"
)
ROUNDS, SETTINGS, READS = 9, SealingSettings(segment_rounds=800, segment_bytes=1 << 30), 200


def measure(folder: Path) -> dict[str, Any]:
    """Return the seconds of each way for one segment of 800 tasks of 39 kB, for each round."""
    found: dict[str, Any] = {"sealed": [], "plain": [], "careful": []}
    with History.open(folder / "history", write=True) as history:
        for number in range(ROUNDS):
            _fill(history, number)
            first = number * SETTINGS.segment_rounds
            values = split_columns([kept.payload for kept in select_rounds(history, first, SETTINGS)]).values
            ways: dict[str, Callable[[], object]] = {
                "plain": partial(_write, folder / f"plain-{number}", values),
                "careful": partial(_write_and_verify, folder / f"careful-{number}", values),
                "sealed": partial(seal_next, history, SETTINGS),
            }
            for name in [*ways][number % 3 :] + [*ways][: number % 3]:
                began = time.perf_counter()
                ways[name]()
                found[name].append(time.perf_counter() - began)
        found["bytes"] = sum(array.nbytes for array in values.values())
        evict_payloads(history, 0)
        found["cold reads"], found["cold batches"] = _read(history), _read_in_sequence(history)
    return found


def _write_and_verify(path: Path, values: dict[Any, Any]) -> None:
    _write(path, values)
    FolderStore(path.parent).sync(path.name)
    group = zarr.open_group(path, mode="r")
    assert all(np.array_equal(np.asarray(group[column.name]), array) for column, array in values.items())


def _fill(history: History, number: int) -> None:
    first = number * SETTINGS.segment_rounds
    bodies = [wire.encode(image_task(5, 1, 1, number * 16 + seed, 18)) for seed in range(16)]
    records = range(first, first + SETTINGS.segment_rounds)
    history.append([Record(f"t{n}", bodies[n % 16], bytes(32), "s", None, 1.0) for n in records])


def _write(path: Path, values: dict[Any, Any]) -> None:
    group = zarr.open_group(path, mode="w", zarr_format=3)
    for column, array in values.items():
        chunk = min(len(array), CHUNK_BYTES // array.itemsize)
        shard = -(-len(array) // chunk) * chunk
        codecs = [ZstdCodec(level=ZSTD_LEVEL), Crc32cCodec()]
        target = group.create_array(
            column.name, shape=array.shape, dtype=array.dtype, chunks=(chunk,), shards=(shard,), compressors=codecs
        )
        target[...] = array


def _read(history: History) -> list[float]:
    draws, rates = random.Random(0), []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        for _ in range(READS):
            history[draws.randrange(len(history))]
        rates.append(READS / (time.perf_counter() - began))
    return rates


def _read_in_sequence(history: History) -> list[float]:
    """Return tasks per second in sequential reads of 64, as `replay` reads them."""
    rates = []
    for number in range(ROUNDS):
        first, began = number * SETTINGS.segment_rounds, time.perf_counter()
        for start in range(first, first + SETTINGS.segment_rounds - 63, 64):
            history.tasks(range(start, start + 64))
        rates.append(SETTINGS.segment_rounds // 64 * 64 / (time.perf_counter() - began))
    return rates


def make_figures(samples: dict[str, Any]) -> list[Figure]:
    """Return the figures of the samples."""
    ratios = [plain / ours for plain, ours in zip(samples["plain"], samples["sealed"], strict=True)]
    careful = [other / ours for other, ours in zip(samples["careful"], samples["sealed"], strict=True)]
    megabytes = samples["bytes"] / 1e6
    return [
        make_figure("speed of sealing / zarr alone", ratios, 0.8, least=True),
        make_figure("speed of sealing / zarr with verification", careful),
        make_figure("MB per second, sealing", [megabytes / value for value in samples["sealed"]]),
        make_figure("MB per second, zarr alone", [megabytes / value for value in samples["plain"]]),
        make_figure("tasks per second from the archive, one by one", samples["cold reads"]),
        make_figure("tasks per second from the archive, in sequence", samples["cold batches"]),
    ]
