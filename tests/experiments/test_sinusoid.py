"""The table of known answers on sinusoids, at a small size."""

import dataclasses
import json
import math

import pytest
import torch
from online_meta.functional.model import model_loss
from trainers.models import mlp

from tests.experiments.common.algorithms import build_algorithm
from tests.experiments.sinusoid_known_answers import ALGORITHMS, GLOBS, draw_tasks, render, run_row


def test_tasks_are_distinct_sinusoids():
    tasks = draw_tasks(torch.Generator().manual_seed(0), 50)
    again = draw_tasks(torch.Generator().manual_seed(0), 50)
    assert torch.equal(tasks.query.y, again.query.y)
    assert tasks.support.x.shape == tasks.query.y.shape == (50, 10, 1)
    assert len(torch.unique(tasks.support.y[:, 0, 0])) == 50
    # y = A sin(x - p) in support and query, so one fit of sin x and cos x matches both.
    for k in range(50):
        x = torch.cat([tasks.support.x[k], tasks.query.x[k]])
        y = torch.cat([tasks.support.y[k], tasks.query.y[k]])
        waves = torch.cat([x.sin(), x.cos()], 1)
        weights = torch.linalg.lstsq(waves, y).solution
        assert float((waves @ weights - y).abs().max()) < 1e-3
        assert 0.1 <= float(weights.norm()) <= 5.0
        assert 0 <= math.atan2(-float(weights[1]), float(weights[0])) <= math.pi


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=lambda algorithm: algorithm.label)
def test_every_algorithm_computes_a_finite_loss(algorithm):
    module = mlp(1, 1, context=5 if algorithm.fast == "context" else 0)
    inner, gradient = build_algorithm(algorithm, model_loss(module, "mse"), GLOBS)
    meta = inner.init(dict(module.named_parameters()))
    first = draw_tasks(torch.Generator().manual_seed(0), 1)
    task = type(first)(*(type(batch)(*(value[0] for value in batch)) for batch in first))
    assert torch.isfinite(gradient(meta, task).loss)


def test_a_row_learns_and_is_saved_and_rendered(tmp_path):
    algorithm = dataclasses.replace(ALGORITHMS[0], how="vmap", batch=10)
    untrained, trained = (run_row(algorithm, n, 0, tmp_path) for n in (0, 300))
    assert trained["error"] < 0.8 * untrained["error"]
    assert run_row(algorithm, 300, 0, tmp_path) == trained
    assert len(list(tmp_path.glob("*.json"))) == 2
    assert json.loads(next(iter(tmp_path.glob("*-300-0.json"))).read_text()) == trained
    result = {"command": "c", "commit": "d", "iterations": 300, "rows": [{**trained, "error": 0.5}]}
    assert "| MAML | Finn et al., 2017 | sgd, lr 0.01, 1 step | exact | 10 | 0.500" in render(result)
    assert "0.67: met |" in render(result)
    assert "0.67: not met |" in render({**result, "rows": [{**trained, "error": 0.7}]})
