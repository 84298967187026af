"""The table of streams that are not stationary, at a size that takes seconds."""

import json
from dataclasses import replace

import pytest
import torch

from deploy.experiments import non_stationary
from deploy.experiments.non_stationary import LABELS, STREAMS, Entry, make_tasks, plot, render, run_entry, settings_of
from online_meta.past import MemoryPast
from trainers.build import build_replay, build_setup


def row(stream, label, seed, losses, components=()):
    asked = {"stream": stream, "label": label, "rounds": len(losses), "seed": seed}
    return {"asked": asked, "losses": losses, "components": [*components] or [0] * len(losses), "seconds": 1.0}


@pytest.mark.parametrize("stream", STREAMS)
def test_the_options_of_each_stream_are_those_of_its_source(stream):
    one, again, other = (make_tasks(STREAMS[stream], seed, 3) for seed in (0, 0, 1))
    assert torch.equal(one[2].query.y, again[2].query.y)
    assert not torch.equal(one[2].query.y, other[2].query.y)


def test_each_label_has_the_policy_of_its_name():
    for label in LABELS:
        settings = settings_of(label, 3)
        assert settings.meta.replay == ("uniform" if label == "mixture" else label)
        build_replay(settings.meta)
        build_setup(settings, MemoryPast())
        assert settings.seed == 3


def test_a_run_is_played_once_and_kept(tmp_path, monkeypatch):
    usual = settings_of("mixture", 0)  # A program takes longer to record than two rounds take.
    quick = replace(usual, engine=replace(usual.engine, how="loop"))
    monkeypatch.setattr(non_stationary, "settings_of", lambda label, seed: quick)
    entry = Entry("recurring", "mixture", 2, 0)
    found = run_entry(entry, tmp_path)
    assert len(found["losses"]) == 2
    assert found["components"][0] == 1
    monkeypatch.setattr(non_stationary, "make_tasks", None)
    assert run_entry(entry, tmp_path) == found
    assert json.loads((tmp_path / "recurring-mixture-2-0.json").read_text()) == found
    with pytest.raises(TypeError):
        run_entry(entry._replace(seed=1), tmp_path)


def test_the_table_compares_seed_by_seed_with_uniform_replay():
    rows = [row("drifting", "uniform", seed, [1.0, 2.0, 3.0, 4.0 + seed]) for seed in range(2)]
    rows += [row("drifting", "mixture", seed, [1.0, 2.0, 1.0, 2.0 + seed], [1, 1, 2, 3]) for seed in range(2)]
    result = {"command": "c", "commit": "abc", "iterations": 4, "rows": rows}
    lines = [line for line in render(result).splitlines() if line.startswith("| drifting")]
    assert lines == [
        "| drifting | uniform | 10.50 ± 0.50 |  | 3.75 ± 0.25 |  | 1.00 ± 0.00 |",
        "| drifting | mixture | 6.50 ± 0.50 | -4.00 ± 0.00 | 1.75 ± 0.25 | 3.00 ± 0.00 | 1.00 ± 0.00 |",
    ]
    assert plot(rows).startswith(b"\x89PNG")
