"""The examples in docs/how-to/history.md work as printed."""

import tomllib
from pathlib import Path
from typing import Any

import torch

from deploy.config.config import make_config
from online_meta.types import Batch, Task
from streams.formats import wire
from streams.history.history import History
from streams.history.sealing import SealingSettings, seal_next
from streams.types import Record
from tests.docs.pages import code_of, read_page

PAGE = read_page("how-to/history.md")
RUN = {
    "run": {"path": "runs/first"},
    "task": {"x_shape": [1], "y": "real", "y_shape": [1]},
    "model": {"build": "trainers.models:mlp", "args": {"inputs": 1, "outputs": 1}, "loss": "mse"},
}


def block(language: str) -> str:
    (found,) = code_of(PAGE, language)
    return found


def test_the_configuration_is_valid() -> None:
    history = make_config({**RUN, **tomllib.loads(block("toml"))}, "docs/how-to/history.md").history
    assert history.archive == "s3://my-bucket/runs/first"
    assert history.sealing == SealingSettings(), "a value shown as a default is not the default"


def test_tasks_are_read_with_zarr_alone(tmp_path: Path) -> None:
    tasks = [
        Task(Batch(torch.randn(2 + n, 3), torch.zeros(2 + n)), Batch(torch.ones(1, 3), torch.ones(1))) for n in range(4)
    ]
    with History.open(tmp_path, write=True) as history:
        history.append([Record(f"t{n}", wire.encode(task), b"d" * 32, "s", None, 1.0) for n, task in enumerate(tasks)])
        marker = seal_next(history, SealingSettings(segment_rounds=4))
    assert marker is not None
    code = block("python").replace(
        "runs/first/history/archive/segments/000000000000-000000001023-0", f"{tmp_path}/archive/segments/{marker.name}"
    )
    names: dict[str, Any] = {}
    exec(code, names)
    assert torch.equal(torch.from_numpy(names["third"]), tasks[2].support.x)
