"""The table of non-stationary streams, at a small size."""

from dataclasses import replace

from deploy.config.config import read_config
from online_meta import registry
from online_meta.learners import MemoryReplayBuffer
from online_meta.regret.ledger import MAIN_LEARNER
from online_meta.regret.scoring import score_task
from streams import sources
from trainers.build import build_context, build_learners

from tests.experiments.common.playing import find_task_optima, finish_replays, play_stream
from tests.experiments.non_stationary.page import plot, render
from tests.experiments.non_stationary.runs import (
    COMPARATOR,
    CONFIG,
    LABELS,
    MOST,
    SHARED,
    STREAMS,
    list_replays,
    make_rows,
)


def make_row(stream, label, seed, losses, components=()):
    asked = {"stream": stream, "label": label, "rounds": len(losses), "seed": seed}
    return {"asked": asked, "losses": losses, "components": [*components] or [0] * len(losses), "seconds": 1.0}


def test_each_label_has_the_settings_that_its_name_states():
    for label, own in LABELS.items():
        settings = read_config(CONFIG, (*SHARED, *own)).trainer()
        context = build_context(settings, MemoryReplayBuffer())
        assert context.steps_per_round == (3 * MOST if label.endswith(" 18 steps") else 3)
        mixture = build_learners(settings, context).get("dp_mixture")
        assert settings.meta.replay == (label if label in ("recent", "reservoir", "prioritised", "all") else "uniform")
        assert settings.answers == ("dp_mixture" if mixture else None)
        assert len(mixture.counts if mixture else ()) == (MOST if label == "mixture" else label.startswith("one comp"))


def test_the_rows_of_a_stream(tmp_path):
    """No learner is better than the best initialisation of each task, and what is finished is not played again."""
    quick = ("engine.batching=loop", "meta.steps_per_round=1", "meta.batch=1", "regret.dynamic_steps=10")
    replays = list_replays("recurring", ["uniform", "mixture"], [0], 3, tmp_path)
    replays = [one._replace(overrides=(*one.overrides, *quick)) for one in replays]
    (entries,) = finish_replays({"recurring": replays}, 1).values()
    rows = [row for entry in entries for row in make_rows("recurring", entry, 3)]
    played, best, mixture = rows
    assert [row["asked"]["label"] for row in rows] == ["uniform", COMPARATOR, "mixture"]
    assert 0 < best["total"] < sum(played["losses"])
    assert best["error"] == 0.0, "all three rounds are evaluated"
    assert (len(mixture["losses"]), played["components"]) == (3, [0])
    assert mixture["components"][-1] >= 1
    (again,) = finish_replays({"recurring": replays}, 1).values()
    assert [row for entry in again for row in make_rows("recurring", entry, 3)] == rows


def test_the_search_for_the_best_initialisation_starts_from_the_last_leader(tmp_path):
    still = read_config(CONFIG, (*SHARED, "engine.batching=loop", "regret.dynamic_steps=0"))
    still, source = still.trainer(), registry.load_module(sources, STREAMS["recurring"].source)
    options = replace(source.Settings(), **STREAMS["recurring"].options)
    tasks = [source.make_task(options, 0, t) for t in range(4)]
    *_, last = play_stream(still, MAIN_LEARNER, tasks, tmp_path)
    reached = [score_task(last.learner.inner, last.learner.engine.meta(), task).loss_after for task in tasks]
    found = find_task_optima(still, tasks, tmp_path).cumulative_loss
    assert 0.99 * sum(reached) < found <= sum(reached) * (1 + 1e-6), "of a task's starts, the best one counts"


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
