"""A run whose tasks have labels."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load

from tests.deploy.conftest import Cli
from tests.support.daemon import Daemon, encode, free_port, running_daemon, sinusoid_config


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    folder = tmp_path_factory.mktemp("classes")
    text = sinusoid_config(folder / "run", free_port())
    for old, new in (
        ('y = "real"\ny_shape = [1]', 'y = "class"\nways = 3'),
        ("outputs = 1", "outputs = 3"),
        ('loss = "mse"', 'loss = "cross_entropy"'),
        ('baselines = ["from_scratch"]\noptions.from_scratch = { steps = 2 }', "baselines = []\ncomparator = []"),
    ):
        assert old in text
        text = text.replace(old, new)
    (folder / "config.toml").write_text(text)
    with running_daemon(folder / "config.toml") as running:
        yield running


def task(*labels: int) -> dict[str, torch.Tensor]:
    x, y = torch.linspace(-1, 1, len(labels))[:, None], torch.tensor(labels)
    return {"support_x": x, "support_y": y, "query_x": x, "query_y": y}


@pytest.mark.parametrize("wrong", [-1, 3])
def test_a_label_outside_the_classes_is_refused(daemon: Daemon, wrong: int) -> None:
    answer = daemon.post(encode(task(0, 1, wrong)))
    assert (answer.status_code, answer.json()["reason"]) == (422, "label_out_of_range")
    assert f"the label {wrong} at sample 2; labels run from 0 to 2" in answer.json()["detail"]


def test_fractional_labels_are_refused(daemon: Daemon) -> None:
    answer = daemon.post(encode({**task(0, 1), "support_y": torch.tensor([0.0, 1.0])}))
    assert (answer.status_code, answer.json()["reason"]) == (422, "wrong_dtype")


def test_accuracy_is_reported_everywhere_and_labels_are_predicted(daemon: Daemon, cli: Cli, tmp_path: Path) -> None:
    learned = daemon.status()["rounds"]["learned"]
    assert daemon.post(encode(task(0, 1, 2, 0)), "labels").status_code == 201
    status = daemon.wait_until_learned(learned + 1)
    accuracy = status["last"]["accuracy"]
    assert accuracy in (0.0, 0.25, 0.5, 0.75, 1.0)
    assert f"online_meta_task_accuracy {accuracy}" in daemon.client.get("/metrics").text
    assert json.loads((daemon.log.parent / "run/rounds.jsonl").read_text())["accuracy"] == accuracy
    assert daemon.client.get("/v1/regret").json()["accuracy"] == [accuracy]
    tensors = task(0, 1, 2)
    (tmp_path / "support").write_bytes(encode({key: tensors[key] for key in ("support_x", "support_y")}))
    (tmp_path / "query").write_bytes(encode({"query_x": tensors["query_x"]}))
    ask = ("--support", tmp_path / "support", "--query", tmp_path / "query", "--url", daemon.url)
    assert cli("adapt", *ask, "--out", tmp_path / "out").code == 0
    answer = load((tmp_path / "out").read_bytes())
    assert torch.equal(answer["labels"], answer["predictions"].argmax(1))
    assert cli("adapt", *ask).out.split() == [str(label) for label in answer["labels"].tolist()]
