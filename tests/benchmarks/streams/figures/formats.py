"""What it takes to validate an arrival and to read it again: each form of a task against one tensor in safetensors.

Every task has 25 support and 15 query samples of 48 float32 numbers or as many bytes. The forms take turns.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from online_meta.types import Batch, Task
from streams.formats import wire
from streams.formats.json_body import read_as_safetensors
from streams.history.history import decode_view
from streams.spec import InputSpec, Limits, TaskSpec
from tests.benchmarks.streams.figure import Figure, make_figure

TITLE = "Tasks validated and read again in one thread, as a share of those of one tensor in safetensors"
ROUNDS, SECONDS = 7, 0.5
LIMITS = Limits()
PLAIN = TaskSpec(x_shape=(48,), ways=5)
NAMED = TaskSpec(x={"tokens": InputSpec((16,), "int64"), "mask": InputSpec((16,))}, ways=5)
TAGS = TaskSpec(x_shape=(16,), ways=5, y_shape=(16,))


def _plain(n: int) -> Batch:
    return Batch(torch.randn(n, 48), torch.randint(5, (n,)))


def _named(n: int) -> Batch:
    return Batch({"mask": torch.ones(n, 16), "tokens": torch.randint(99, (n, 16))}, torch.randint(5, (n,)))


def _weighted(n: int) -> Batch:
    return _named(n)._replace(weight=torch.ones(n))


def _tags(n: int) -> Batch:
    y = torch.randint(5, (n, 16))
    y[:, 3] = -100
    return Batch(torch.randn(n, 16), y)


FORMS: dict[str, tuple[TaskSpec, Callable[[int], Batch]]] = {
    "one tensor": (PLAIN, _plain),
    "named inputs": (NAMED, _named),
    "named inputs with weights": (NAMED, _weighted),
    "a class for each entry, some without": (TAGS, _tags),
}


def measure(folder: Path) -> dict[str, Any]:
    """Return the tasks per second of processor time of each form, for each round."""
    torch.manual_seed(0)
    works = {}
    for name, (spec, make) in FORMS.items():
        body = wire.encode(Task(make(25), make(15)))
        works[name] = (body, spec)
    lists = {name: tensor.tolist() for name, tensor in wire.name_fields("support", _plain(25)).items()}
    lists |= {name: tensor.tolist() for name, tensor in wire.name_fields("query", _plain(15)).items()}
    works["one tensor as JSON"] = (json.dumps(lists).encode(), PLAIN)
    found: dict[str, list[float]] = {name: [] for name in works}
    for round in range(ROUNDS + 1):
        for name, (body, spec) in works.items():
            rate = _count(body, spec) / SECONDS
            if round:  # The first round warms up.
                found[name].append(rate)
    return found


def _count(body: bytes, spec: TaskSpec) -> int:
    count, end = 0, time.process_time() + SECONDS
    while time.process_time() < end:
        decode_view(wire.canonical_bytes(read_as_safetensors(body, spec, LIMITS), spec, LIMITS))
        count += 1
    return count


def make_figures(samples: dict[str, Any]) -> list[Figure]:
    """Return the figures of the samples."""
    plain = samples["one tensor"]
    shares = [
        make_figure(name, [one / base for one, base in zip(rates, plain, strict=True)])
        for name, rates in samples.items()
        if name != "one tensor"
    ]
    return [make_figure("tasks per second of processor time, one tensor", plain), *shares]
