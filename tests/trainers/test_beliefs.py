"""Runs of LLAMA and Bayesian MAML: played, stopped and killed, with the same bits."""

import math

import pytest

from tests.support.runs import SETTINGS, changed, kill, lines, play
from tests.trainers.conftest import ROUNDS

KRON = {"curvature": "kron"}
LOOP = changed(SETTINGS, engine={"batching": "loop"})
"""How tasks are computed is not chosen by measured times, so that several runs have the same bits."""
LLAMA = changed(
    LOOP,
    inner={
        "rule": "proximal",
        "options": {"strength": 2.0},
        "posterior": "laplace",
        "posterior_options": KRON,
        "samples": 10,
    },
    meta={"gradient": "laplace", "options": {"eta": 1e-3, **KRON}},
    regret={"baselines": ()},
)
PARTICLES = changed(
    LOOP,
    inner={"rule": "svgd", "options": {"particles": 5}, "posterior": "particles", "samples": 5},
    regret={"baselines": ()},
)
RUNS = {
    "LLAMA": LLAMA,
    "BMAML, chaser": changed(PARTICLES, meta={"gradient": "chaser"}),
    "BMAML, mixture": changed(PARTICLES, meta={"gradient": "exact"}),
}


@pytest.mark.parametrize("settings", RUNS.values(), ids=RUNS)
def test_a_run_that_is_stopped_and_killed_gives_the_same_bits(settings, tmp_path, history):
    whole = play(tmp_path / "whole", history, ROUNDS, settings), lines(tmp_path / "whole")
    assert all(math.isfinite(line["nll"]) for line in whole[1] if "nll" in line)
    play(tmp_path / "parts", history, 4, settings)
    kill(tmp_path / "parts", history, 2, settings)
    assert (play(tmp_path / "parts", history, ROUNDS, settings), lines(tmp_path / "parts")) == whole
