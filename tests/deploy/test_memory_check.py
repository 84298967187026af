"""``online-meta check`` prints the memory that a rank will need, and accepts models that are large by design."""

import re
from pathlib import Path

import pytest

from tests.deploy.conftest import Cli
from tests.support.daemon import running_daemon

SETS = ("--set", "serve.port=0")
LORA = """
[model]
build = "trainers.models:lora"
loss = "mse"
recompute = ["body.*"]
[model.args]
build = "trainers.models:transformer"
args = { outputs = 2, length = 5, features = 3, width = 8, heads = 2 }
rank = 2
layers = ["body.*"]
freeze = true
learned = ["head.*"]
"""


def sizes(out: str) -> dict[str, float]:
    """Return the table printed under "memory", in bytes."""
    units = {"B": 1.0, "kB": 1e3, "MB": 1e6, "GB": 1e9}
    found = re.findall(r"^ {9,}([\d.e+]+) ([kMG]?B)  (.+)$", out, re.MULTILINE)
    return {what: float(number) * units[unit] for number, unit, what in found}


def test_the_peak_is_reported_with_its_parts(cli: Cli, config: Path) -> None:
    ended = cli("check", config, *SETS)
    assert (ended.code, ended.err) == (0, "")
    reported = re.search(r"^memory   ([\d.]+) kB per rank at its peak, estimated", ended.out, re.MULTILINE)
    assert reported is not None
    assert "samples, a synthetic task because no task is known yet" in ended.out
    parts = {what: size for what, size in sizes(ended.out).items() if "stacked" not in what}
    assert "meta-parameters and optimizers" in parts
    assert float(reported[1]) * 1e3 == pytest.approx(sum(parts.values()), rel=0.02)


def test_more_steps_and_larger_tasks_take_more(cli: Cli, config: Path) -> None:
    few, many = (sizes(cli("check", config, *SETS, "--set", f"inner.steps={steps}").out) for steps in (4, 40))
    assert many["the inner trajectory"] == pytest.approx(10 * few["the inner trajectory"], rel=0.05)
    kept = sizes(
        cli("check", config, *SETS, "--set", "inner.steps=40", "--set", "meta.options={rematerialise=true}").out
    )
    assert kept["the inner trajectory"] < 0.4 * many["the inner trajectory"]


def test_task_sizes_are_read_from_the_history(cli: Cli, config: Path) -> None:
    with running_daemon(config) as running:
        running.submit(0)
        running.wait_until_learned(1)
        running.drain()
    assert "for tasks of 5 + 5 samples\n" in cli("check", config, *SETS).out


def test_low_rank_adaptation_of_a_frozen_model_passes(cli: Cli, config: Path) -> None:
    text = config.read_text()
    text = re.sub(r"\[model\].*?(?=\n\[)", LORA.strip(), text, flags=re.DOTALL)
    text = text.replace("x_shape = [1]", "x_shape = [5, 3]").replace("y_shape = [1]", "y_shape = [2]")
    config.write_text(text)
    ended = cli("check", config, *SETS, "--set", 'inner.fast=["*lora*"]')
    assert (ended.code, ended.err) == (0, "")
    assert "further tensors are frozen" in ended.out
    assert "frozen weights and buffers" in ended.out
    wrong = cli("check", config, *SETS, "--set", 'model.recompute=["boddy.*"]')
    assert wrong.code == 78
    assert "[model] recompute = 'boddy.*' matches none of the model's layers: did you mean" in wrong.err
