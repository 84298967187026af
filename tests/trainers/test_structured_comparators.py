"""Comparators and learners in closed form give for named inputs and padded tasks what they give for one tensor."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import online_meta as om
from online_meta.batches import map_tensors
from online_meta.learners import MemoryReplayBuffer
from streams.history.history import History
from tests.support.runs import SETTINGS, fill, lines, play
from tests.trainers.test_hindsight import DIMENSIONS, LR, TASKS, regression
from trainers.comparators import RefreshRequest, load_comparator
from trainers.settings import ModelSettings, RegretSettings

ROUNDS = 6


class Split(nn.Module):
    """A linear map of two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(DIMENSIONS, 1, bias=False).double()

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.layer(torch.cat([left, right], 1))


def split(batch: om.Batch) -> om.Batch:
    """Return the batch with two inputs, and two more samples of weight 0."""
    padded = map_tensors(lambda tensor: torch.cat([tensor, 1e3 * tensor[:2]]), batch)
    weight = torch.cat([torch.ones(len(batch.x)), torch.zeros(2)])
    return om.Batch({"left": padded.x[:, :2], "right": padded.x[:, 2:]}, padded.y, weight)


def linear() -> nn.Module:
    return nn.Linear(DIMENSIONS, 1, bias=False).double()


def test_learners_in_closed_form_read_named_inputs_as_one_row(tmp_path: Path) -> None:
    learners = ("constant", "ridge_head", "pooled_ridge", "hierarchical_bayes")
    found = []
    for build, tasks in (("linear", TASKS[:4]), ("Split", [om.Task(*map(split, task)) for task in TASKS[:4]])):
        model = ModelSettings(f"{__name__}:{build}", {}, loss="mse")
        settings = replace(SETTINGS, model=model, regret=RegretSettings(baselines=learners))
        with History.open(tmp_path / f"{build} tasks", write=True) as history:
            fill(history, tasks)
            play(tmp_path / build, history, 4, settings)
        found.append([line["learners"] for line in lines(tmp_path / build)])
    for plain, named in zip(*found, strict=True):
        for learner in learners:
            assert named[learner]["loss_after"] == pytest.approx(plain[learner]["loss_after"], rel=1e-9), learner


@pytest.mark.parametrize("kind", ["closed_form", "hindsight", "dynamic"])
def test_a_comparator_of_named_inputs_and_weights_is_that_of_one_tensor(kind: str) -> None:
    module, plain = Split(), regression(TASKS[:ROUNDS])
    inner = om.Inner(om.model_loss(module, "mse"), om.rules.sgd(lr=LR), steps=1)
    start = inner.init({"layer.weight": torch.zeros(1, DIMENSIONS, dtype=torch.float64)})
    buffer = MemoryReplayBuffer()
    for round, task in enumerate(TASKS[:ROUNDS]):
        buffer.add(round, om.Task(*map(split, task)))
    named = replace(plain, inner=inner, gradient=om.exact(inner), start=start, buffer=buffer)
    settings = RegretSettings(hindsight_steps=5, hindsight_restarts=0)
    found, right = (
        load_comparator(kind).refresh(context, settings, RefreshRequest(ROUNDS), None).comparator
        for context in (named, plain)
    )
    assert found.cumulative_loss == pytest.approx(right.cumulative_loss, rel=1e-9)
