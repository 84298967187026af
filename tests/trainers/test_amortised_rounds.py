"""Learners that believe in distributions play rounds, and a restart gives the same bits."""

import pytest

from tests.support.runs import SETTINGS, WAYS, changed, kill, lines, play

CONTEXT = {"args": {"inputs": 2, "outputs": WAYS, "hidden": [4], "context": 3}}
ATTENTIVE = {
    "build": "trainers.models:attentive_decoder",
    "args": {"inputs": 2, "outputs": WAYS, "hidden": [4], "width": 3, "context": 2},
}
DRAWN = {"posterior": "samples", "samples": 3}
VARIATIONAL = {"gradient": "variational", "options": {"kl_weight": 0.1}}
RUNS = {
    "ABML": {"inner": {"rule": "bayes_by_gradient", **DRAWN}},
    "PLATIPUS": {"inner": {"rule": "platipus", "steps": 2, **DRAWN}, "meta": VARIATIONAL},
    "conditional neural process": {
        "model": CONTEXT,
        "inner": {"rule": "encode", "options": {"width": 4}, "steps": 0, "fast": ("context",)},
    },
    "neural statistician": {
        "model": CONTEXT,
        "inner": {
            "rule": "encode",
            "options": {"width": 4, "latent": True, "prior": "standard", "pooled_depth": 1},
            "steps": 0,
            "fast": ("context",),
            **DRAWN,
        },
        "meta": VARIATIONAL,
    },
    "transformer neural process": {
        "model": {
            "build": "trainers.models:in_context_transformer",
            "args": {"inputs": 2, "outputs": WAYS, "width": 4, "heads": 2, "layers": 1},
        },
        "inner": {"rule": "encode", "options": {"in_context": True}, "steps": 0, "fast": ("rows",)},
    },
    "attentive neural process": {
        "model": ATTENTIVE,
        "inner": {
            "rule": "encode",
            "options": {"width": 4, "attention": True, "latent": True},
            "steps": 0,
            "fast": ("network.context", "keys", "values"),
            **DRAWN,
        },
        "meta": VARIATIONAL,
    },
}
LOOP = {"batching": "loop"}
ROUNDS = 3


@pytest.mark.parametrize("name", RUNS)
def test_a_run_of_beliefs_continues_with_the_same_bits(tmp_path, history, name):
    settings = changed(SETTINGS, **RUNS[name])
    settings = changed(settings, regret={"baselines": ()}, checkpoint={"every_rounds": 2}, engine=LOOP)
    right = play(tmp_path / "whole", history, ROUNDS, settings)
    kill(tmp_path / "again", history, 2, settings)
    assert play(tmp_path / "again", history, ROUNDS, settings) == right
    assert lines(tmp_path / "again") == lines(tmp_path / "whole")
    assert all(step["skipped"] is None for line in lines(tmp_path / "whole") for step in line["steps"])
