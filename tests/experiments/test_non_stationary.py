"""The table of non-stationary streams, at a small size."""

import json
from dataclasses import replace

import pytest
import torch
from online_meta.learners import MemoryReplayBuffer
from online_meta.regret.ledger import MAIN_LEARNER
from online_meta.regret.scoring import score_task
from trainers.build import build_context, build_learners, build_replay

from tests.experiments.common.playing import find_task_optima, play_stream
from tests.experiments.non_stationary import runs
from tests.experiments.non_stationary.page import plot, render
from tests.experiments.non_stationary.runs import (
    COMPARATOR,
    LABELS,
    MIXTURE,
    MOST,
    STREAMS,
    Entry,
    make_settings,
    make_tasks,
    run_entry,
)


def make_row(stream, label, seed, losses, components=()):
    asked = {"stream": stream, "label": label, "rounds": len(losses), "seed": seed}
    return {"asked": asked, "losses": losses, "components": [*components] or [0] * len(losses), "seconds": 1.0}


@pytest.mark.parametrize("stream", STREAMS)
def test_each_stream_is_reproducible_and_depends_on_the_seed(stream):
    one, again, other = (make_tasks(STREAMS[stream], seed, 3) for seed in (0, 0, 1))
    assert torch.equal(one[2].query.y, again[2].query.y)
    assert not torch.equal(one[2].query.y, other[2].query.y)


def test_each_label_has_the_settings_that_its_name_states():
    for label, played in LABELS.items():
        settings = make_settings(label, 3)
        setup = build_context(settings, MemoryReplayBuffer())
        assert build_replay(settings.meta)
        assert settings.seed == 3
        assert setup.steps_per_round == (3 * MOST if label.endswith(" 18 steps") else 3)
        mixture = build_learners(settings, setup).get(MIXTURE)
        assert settings.meta.replay == (label if label in ("recent", "reservoir", "prioritised", "all") else "uniform")
        assert len(mixture.counts if mixture else ()) == played.components
    assert [LABELS[label].components for label in ("mixture", "one component", "uniform")] == [MOST, 1, 0]


def test_no_learner_is_better_than_the_best_initialisation_of_each_task(tmp_path, monkeypatch):
    usual = make_settings(COMPARATOR, 0)
    quick = replace(
        usual,
        engine=replace(usual.engine, batching="loop"),
        meta=replace(usual.meta, steps_per_round=1, batch=1),
        regret=replace(usual.regret, dynamic_steps=10),
    )
    monkeypatch.setattr(runs, "make_settings", lambda label, seed: quick)
    (tmp_path / "programs").mkdir()
    best = run_entry(Entry("recurring", COMPARATOR, 3, 0), tmp_path)
    played = run_entry(Entry("recurring", "uniform", 3, 0), tmp_path)
    assert 0 < best["total"] < sum(played["losses"])
    assert best["error"] == 0.0, "all three rounds are evaluated"


def test_the_search_for_the_best_initialisation_starts_from_the_last_leader(tmp_path):
    usual, tasks = make_settings(COMPARATOR, 0), make_tasks(STREAMS["recurring"], 0, 4)
    still = replace(usual, engine=replace(usual.engine, batching="loop"), regret=replace(usual.regret, dynamic_steps=0))
    *_, last = play_stream(still, MAIN_LEARNER, tasks, tmp_path)
    reached = [score_task(last.learner.inner, last.learner.engine.meta(), task).loss_after for task in tasks]
    found = find_task_optima(still, tasks, tmp_path).cumulative_loss
    assert 0.99 * sum(reached) < found <= sum(reached) * (1 + 1e-6), "of a task's starts, the best one counts"


def test_a_finished_run_is_loaded(tmp_path, monkeypatch):
    usual = make_settings("mixture", 0)  # Recording a program takes longer than two rounds.
    quick = replace(usual, engine=replace(usual.engine, batching="loop"))
    monkeypatch.setattr(runs, "make_settings", lambda label, seed: quick)
    entry = Entry("recurring", "mixture", 2, 0)
    found = run_entry(entry, tmp_path)
    assert len(found["losses"]) == 2
    assert found["components"][0] == 1
    monkeypatch.setattr(runs, "make_tasks", None)
    assert run_entry(entry, tmp_path) == found
    assert json.loads((tmp_path / "recurring-mixture-2-0.json").read_text()) == found
    with pytest.raises(TypeError):
        run_entry(entry._replace(seed=1), tmp_path)


def test_the_table_compares_seed_by_seed():
    rows = [make_row("drifting", "uniform", seed, [1.0, 2.0, 3.0, 4.0 + seed]) for seed in range(2)]
    rows += [make_row("drifting", "mixture", seed, [1.0, 2.0, 1.0, 2.0 + seed], [1, 1, 2, 3]) for seed in range(2)]
    bests = [make_row("drifting", COMPARATOR, seed, []) | {"total": 4.0 + seed, "error": 0.5} for seed in range(2)]
    text = render({"command": "c", "commit": "abc", "iterations": 4, "rows": [*rows, *bests]})
    assert [line[2:] for line in text.splitlines() if line.startswith(("| drifting", "- drifting"))] == [
        "drifting | uniform | 2 | 10.50 ± 0.50 |  | 6.00 ± 0.00 | 3.75 ± 0.25 |  | 1.00 ± 0.00 |",
        "drifting | mixture | 2 | 6.50 ± 0.50 | -4.00 ± 0.00 | 2.00 ± 0.00 | 1.75 ± 0.25 | 3.00 ± 0.00 | 1.00 ± 0.00 |",
        "drifting: 4.50 ± 0.50; the estimate for one seed has a standard error of 0.50",
    ]
    assert plot([*rows, *bests]).startswith(b"\x89PNG")
