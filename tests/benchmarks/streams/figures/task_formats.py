"""Take in the same small tasks in each form that people have them in, in turn with plain safetensors."""

import csv
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from online_meta.types import Task
from streams.formats import wire
from streams.history.history import History
from streams.ingest.ingest import Ingest
from streams.sources import rows
from streams.spec import InputSpec, Limits, TaskSpec
from streams.tables.declared_columns import DeclaredColumn
from streams.types import Arrival, TaskSource
from tests.benchmarks.streams.figure import Figure, make_figure
from tests.benchmarks.streams.load import INPUTS, make_small_tasks, to_json
from tests.support.daemon import free_port, running_daemon, wait_for

TITLE = "Small tasks of 5 and 5 samples with 8 inputs in each form, as a ratio to plain safetensors"
TASKS, STORES, ROWS = 2_000, 40, 10
ROUNDS, SECONDS, CLIENTS = 5, 4, 8
PLAIN = TaskSpec(x_shape=(INPUTS,), y="real", y_shape=(1,))
NAMED = TaskSpec(x={"left": InputSpec((INPUTS // 2,)), "right": InputSpec((INPUTS // 2,))}, y="real", y_shape=(1,))
CONFIG = f"""
[run]
path = "{{run}}"
[task]
x_shape = [{INPUTS}]
y = "real"
y_shape = [1]
[model]
build = "trainers.models:mlp"
args = {{{{ inputs = {INPUTS}, outputs = 1, hidden = [8] }}}}
loss = "mse"
[regret]
comparator = []
baselines = []
[serve]
port = {{port}}
try_tasks = false
limits = {{{{ backlog = 100_000_000 }}}}
"""


class Waiting:
    """A source whose tasks wait in memory."""

    def __init__(self, bodies: list[bytes]) -> None:
        """Take the bodies, which are repeated."""
        self._bodies = bodies

    def read(self, after: str | None) -> Iterator[Arrival | None]:
        """Yield ``TASKS`` tasks, then None."""
        for number, body in enumerate(islice(cycle(self._bodies), TASKS)):
            yield Arrival(f"t{number}", body, "waiting", str(number))
        while True:
            yield None


def measure(folder: Path) -> dict[str, Any]:
    """Return durable tasks per second of each form: from a source in memory or a file, and over HTTP."""
    tasks = make_small_tasks()
    _write_rows(folder / "rows.csv")
    plain, declared = (_read_rows(folder / "rows.csv", columns) for columns in ({}, _declare()))
    forms: dict[str, tuple[Callable[[], TaskSource], TaskSpec]] = {
        "safetensors": (lambda: Waiting([wire.encode(task) for task in tasks]), PLAIN),
        "JSON": (lambda: Waiting([to_json(task) for task in tasks]), PLAIN),
        "named inputs": (lambda: Waiting([_name_inputs(task) for task in tasks]), NAMED),
        "rows of a CSV": (plain, PLAIN),
        "rows with scaled columns": (declared, PLAIN),
    }
    found: dict[str, Any] = {name: [] for name in forms} | {"http": {"small": [], "json": []}}
    for number in range(ROUNDS):
        for name, (make, spec) in forms.items():
            found[name].append(_measure_rate(folder / f"{name} {number}", make(), spec))
    config = folder / "config.toml"
    config.write_text(CONFIG.format(run=folder / "run", port=free_port()))
    with running_daemon(config) as daemon, daemon.paused("trainer"):
        for number in range(-1, ROUNDS):
            for kind, rates in found["http"].items():
                rate = _measure_http(daemon.url, kind, f"{kind}{number}", SECONDS if number >= 0 else 1)
                rates += [rate] if number >= 0 else []  # the first round warms up
    return found


def _name_inputs(task: Task) -> bytes:
    tensors: dict[str, torch.Tensor] = {}
    for part, batch in task._asdict().items():
        left, right = batch.x.split(INPUTS // 2, 1)
        named = {f"{part}_x.left": left, f"{part}_x.right": right, f"{part}_y": batch.y}
        tensors |= {name: tensor.contiguous() for name, tensor in named.items()}
    return save(tensors)


def _write_rows(path: Path) -> None:
    random = torch.Generator().manual_seed(0)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["store", *(f"x{at}" for at in range(INPUTS)), "y"])
        for values in torch.randn(TASKS * ROWS, INPUTS + 1, generator=random).tolist():
            store = int(torch.randint(STORES, (), generator=random))
            writer.writerow([f"store {store}", *(f"{value:.7g}" for value in values)])


def _declare() -> dict[str, DeclaredColumn]:
    return {name: DeclaredColumn(kind="number", scale="standard") for name in [f"x{at}" for at in range(INPUTS)]}


def _read_rows(path: Path, columns: dict[str, DeclaredColumn]) -> Callable[[], TaskSource]:
    x = tuple(f"x{at}" for at in range(INPUTS))
    settings = rows.Settings(path=str(path), x=x, y=("y",), group_by="store", max_rows=ROWS, columns=columns)

    def make() -> TaskSource:
        source = rows.create_source(settings, PLAIN, "rows", 0)
        assert source is not None
        return source

    return make


def _measure_rate(folder: Path, source: TaskSource, spec: TaskSpec) -> float:
    """Take in all tasks, and return tasks per second from the first read to the last commit."""
    least = TASKS - STORES  # in each store, rows may be left for one more task
    with History.open(folder, write=True) as history:
        ingest = Ingest(history, spec, Limits(backlog=1 << 40), lambda: 0, lambda *_: None, lambda *_: None)
        began = time.perf_counter()
        ingest.pull("source", source)
        wait_for("the tasks are committed", lambda: len(history) >= least, 300)
        taken = time.perf_counter() - began
        ingest.close()
    return least / taken


def _measure_http(url: str, kind: str, name: str, seconds: int) -> float:
    command = [sys.executable, "-m", "tests.benchmarks.streams.load", url, str(seconds), str(CLIENTS), name, kind]
    load = json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
    rate: float = len(load["taken"]) / load["seconds"]
    return rate


def make_figures(samples: dict[str, Any]) -> list[Figure]:
    """Return the figures of the samples."""
    forms = {name: rates for name, rates in samples.items() if name != "http"}
    plain, http = forms["safetensors"], samples["http"]
    others = [name for name in forms if name != "safetensors"]
    ratios = [make_figure(f"{name} / safetensors", _divide(forms[name], plain)) for name in others]
    return [
        make_figure("JSON / safetensors, over HTTP", _divide(http["json"], http["small"])),
        *ratios,
        make_figure("durable tasks per second in safetensors, over HTTP", http["small"]),
        make_figure("durable tasks per second in safetensors, from memory", plain),
    ]


def _divide(rates: list[float], others: list[float]) -> list[float]:
    return [one / other for one, other in zip(rates, others, strict=True)]
