"""A daemon whose learners are tables: a baseline leads, another learner answers, and everything says so."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load
from torch import nn

from tests.deploy.conftest import Cli
from tests.support.daemon import decode, encode, running_daemon, sinusoid, write_sinusoid

LEARNERS = """
answers = "fast@1"
[[learner]]
kind = "from_scratch"
name = "leader"
options = { steps = 2 }
[[learner]]
kind = "ftml"
name = "fast"
[learner.meta]
lr = 0.1
[learner.inner]
steps = 3
lr = 0.05
answer_steps = [1, 3]
[[learner]]
kind = "ftml"
"""
ROUNDS = 4


def adapted(weights: dict[str, torch.Tensor], t: int) -> torch.Tensor:
    """Return what plain torch predicts for a task after one step from the weights."""
    task = decode(sinusoid(t))
    model = nn.Sequential(nn.Flatten(), nn.Linear(1, 8), nn.ReLU(), nn.Linear(8, 1))
    model.load_state_dict(weights)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    optimizer.zero_grad()
    nn.functional.mse_loss(model(task.support.x), task.support.y).backward()
    optimizer.step()
    return model(task.query.x).detach()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a finished run in which from_scratch leads and a second FTML answers."""
    folder = tmp_path_factory.mktemp("several")
    config = write_sinusoid(folder, LEARNERS)
    config.write_text(
        config.read_text().replace('baselines = ["from_scratch"]\noptions.from_scratch = { steps = 2 }\n', "")
    )
    with running_daemon(config) as daemon:
        assert [answer.status_code for answer in daemon.submit(*range(ROUNDS))] == [201] * ROUNDS
        status = daemon.wait_until_learned(ROUNDS)
        ladder = [f"ftml@{k}" for k in (0, 1, 5, 10, 20)]
        answers = ["leader", "fast", "fast@1", "ftml", *ladder, "pool"]
        assert (status["leader"], [*status["learners"]]) == ("leader", answers)
        assert {"fast", "fast@1", "ftml"} <= status["regret"].keys()
        series = daemon.client.get("/v1/regret").json()
        assert series["leader"] == "leader"
        assert series["loss_after"] == series["learners"]["leader"]["loss"]
        task = decode(sinusoid(99))
        body = encode({"support_x": task.support.x, "support_y": task.support.y, "query_x": task.query.x})
        answer, weights = daemon.client.post("/v1/adapt", content=body), daemon.client.get("/v1/weights")
        assert answer.headers["X-Online-Meta-Round"] == weights.headers["X-Online-Meta-Round"]
        found = load(answer.content)["predictions"]
        torch.testing.assert_close(found, adapted(load(weights.content), 99), rtol=1e-5, atol=1e-6)
        metrics = daemon.client.get("/metrics").text
        assert 'online_meta_regret{against="fast"}' in metrics
        assert daemon.drain() == 0
    return folder


def test_every_figure_names_the_learner_that_leads(folder: Path) -> None:
    report = json.loads((folder / "run" / "report.json").read_text())
    assert report["leader"] == "leader"
    assert [*report["learners"]][:4] == ["leader", "fast", "fast@1", "ftml"]
    lines = [json.loads(line) for line in (folder / "run" / "rounds.jsonl").read_text().splitlines()]
    assert [line["loss_after"] for line in lines] == [line["learners"]["leader"]["loss_after"] for line in lines]
    own, other = (report["learners"][name]["cumulative_loss"] for name in ("leader", "fast"))
    assert report["regret"]["fast"]["value"] == pytest.approx(own - other)
    page = (folder / "run" / "report.html").read_text()
    assert "<th>leader is</th>" in page
    assert "leader against fast with 1 step: too early." in page
    assert "leader against pool: too early." in page


def test_a_replay_and_a_restart_keep_the_learners(cli: Cli, folder: Path) -> None:
    config = folder / "config.toml"
    ended = cli("replay", config, "--out", folder / "again", "--json", "--set", "serve.answers=ftml")
    assert ended.code == 0
    found, before = json.loads(ended.out), json.loads((folder / "run" / "report.json").read_text())
    assert (found["leader"], found["learners"]) == (before["leader"], before["learners"])
    config.with_name("other.toml").write_text(config.read_text().replace("lr = 0.1\n", "lr = 0.2\n"))
    refused = cli("check", folder / "other.toml")
    assert refused.code == 78
    assert "meta of the learner 'fast' was {'lr': 0.1} and is {'lr': 0.2}. Set them back" in " ".join(
        refused.err.split()
    )
