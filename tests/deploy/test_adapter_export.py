"""What a run has learned of low-rank additions leaves it as an adapter of the library ``peft``."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from streams.history.history import History
from tests.deploy.conftest import Cli
from tests.support.runs import SETTINGS, WAYS, fill, play, task
from trainers.build import build_module
from trainers.models.adapters import load_adapter
from trainers.settings import ModelSettings

PLAIN = ModelSettings("trainers.models:mlp", {"inputs": 2, "outputs": WAYS, "hidden": [4]})
LOW_RANK = ModelSettings("trainers.models:lora", {"build": PLAIN.build, "args": PLAIN.args, "rank": 2, "alpha": 6.0})


@pytest.fixture(autouse=True)
def restore_deterministic_algorithms():
    before = torch.are_deterministic_algorithms_enabled()
    yield
    torch.use_deterministic_algorithms(before)


def run(folder: Path, model: ModelSettings) -> Path:
    with History.open(folder / "history", write=True) as history:
        fill(history, [task(seed) for seed in range(3)])
        play(folder / "run", history, 3, replace(SETTINGS, model=model))
    return folder / "run" / "checkpoints" / "3"


def test_an_exported_adapter_computes_what_the_leader_does(cli: Cli, tmp_path: Path) -> None:
    checkpoint = run(tmp_path, LOW_RANK)
    ended = cli("export", "--adapter", checkpoint, tmp_path / "adapter")
    assert (ended.code, ended.out) == (0, f"{tmp_path}/adapter: the adapter of ftml after 3 rounds\n")
    assert cli("export", checkpoint, tmp_path / "weights.safetensors").code == 0

    leader = build_module(LOW_RANK, 0)
    learned = load_file(tmp_path / "weights.safetensors")
    leader.load_state_dict(learned)
    assert any(value.abs().max() > 0 for name, value in learned.items() if name.endswith("lora_b"))

    base = build_module(PLAIN, 0)
    base.load_state_dict({name: value for name, value in learned.items() if "lora" not in name})
    load_adapter(base, tmp_path / "adapter")
    x = torch.randn(5, 2, generator=torch.Generator().manual_seed(0))
    assert torch.equal(base(x), leader(x))


def test_a_model_without_low_rank_additions_gives_no_adapter(cli: Cli, tmp_path: Path) -> None:
    ended = cli("export", "--adapter", run(tmp_path, PLAIN), tmp_path / "adapter")
    assert ended.code == 78
    assert "gives no adapter: the model has no low-rank additions: build it with rank = 4" in ended.err
