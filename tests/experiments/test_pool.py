"""The table of the pool, and that of its cost, at a small size."""

import json
from dataclasses import replace

import numpy as np
import pytest
from click.testing import CliRunner
from deploy.config.learner_tables import FROM_SCRATCH
from online_meta.learners import MemoryReplayBuffer
from trainers.build import build_context, build_learners
from trainers.learner_settings import POOL

from tests.experiments import pool_cost
from tests.experiments.common.playing import play_stream
from tests.experiments.pool import __main__, runs
from tests.experiments.pool.held_out import convert_hsb, convert_ratings
from tests.experiments.pool.page import find_best, plot, render
from tests.experiments.pool.runs import DEFAULTS_ONLY, Stream, play, run_entry, summarize
from tests.experiments.pool.streams import DEFAULTS, STREAMS, make_sinusoid_settings, make_synthetic_tasks

ROUNDS = 3


def make_small_settings(seed):
    """Return settings with few learners, without recorded programs."""
    made = make_sinusoid_settings(seed)
    kept = ("ftml", "more_steps", "constant", "hierarchical_bayes")
    return replace(
        made,
        model=replace(made.model, args={**made.model.args, "hidden": [4]}),
        inner=replace(made.inner, answer_steps=(0, 1)),
        meta=replace(made.meta, steps_per_round=1),
        learner=tuple(replace(one, meta={}) for one in made.learner if one.name in kept),
        engine=replace(made.engine, batching="loop"),
    )


def make_tasks(seed=0, rounds=ROUNDS):
    return make_synthetic_tasks("drifting", seed, rounds)


@pytest.fixture(scope="module")
def play_of_drifting(tmp_path_factory):
    return play(make_small_settings(0), make_tasks(), tmp_path_factory.mktemp("programs"), DEFAULTS)


def test_the_pool_plays_with_all_and_a_second_pool_with_the_default_experts(play_of_drifting, tmp_path):
    experts = [
        "ftml@0",
        "ftml@1",
        "ftml",
        "more_steps@0",
        "more_steps@1",
        "more_steps",
        "constant",
        "hierarchical_bayes",
    ]
    assert {*play_of_drifting.losses} == {*experts, POOL, DEFAULTS_ONLY}
    assert {*play_of_drifting.weights[POOL][0]} == {*experts}
    assert {*play_of_drifting.weights[DEFAULTS_ONLY][0]} == {
        "ftml@0",
        "ftml@1",
        "ftml",
        "constant",
        "hierarchical_bayes",
    }
    for weights in (each for pool in play_of_drifting.weights.values() for each in pool):
        assert sum(weights.values()) == pytest.approx(1)
    assert {len(each) for each in play_of_drifting.losses.values()} == {ROUNDS}
    assert play_of_drifting.regret["regret"] <= play_of_drifting.regret["bound"]
    assert {*play_of_drifting.seconds} == {"ftml", "more_steps", "constant", "hierarchical_bayes", POOL, DEFAULTS_ONLY}


def test_the_experts_lose_what_they_lose_alone(play_of_drifting, tmp_path):
    settings = make_small_settings(0)
    for name in ("ftml", "hierarchical_bayes"):
        alone = [round.score.loss_after for round in play_stream(settings, name, make_tasks(), tmp_path)]
        assert play_of_drifting.losses[name] == alone


def test_a_finished_run_is_loaded_and_summed_up(tmp_path, monkeypatch):
    stream = Stream("about", ROUNDS, make_tasks, make_small_settings, DEFAULTS, lambda settings, tasks, programs: 6.0)
    row = run_entry("drifting", stream, ROUNDS, 0, tmp_path)
    monkeypatch.setattr(runs, "play", None)
    assert run_entry("drifting", stream, ROUNDS, 0, tmp_path) == row
    found = summarize(row)
    assert found["static"] == pytest.approx(2.0)
    for name, losses in row["losses"].items():
        assert found["mean"][name] == pytest.approx(np.mean(losses), rel=1e-5)
        assert found["late"][name] == pytest.approx(np.mean(losses[1:]), rel=1e-5)


@pytest.mark.parametrize("name", STREAMS)
def test_each_stream_has_a_pool_of_learners_that_can_be_built(name):
    settings = STREAMS[name].settings(3)
    learners = build_learners(settings, build_context(settings, MemoryReplayBuffer()))
    assert next(iter(learners)) == "ftml"
    assert [*learners][-1] == POOL
    assert {*STREAMS[name].defaults} <= {*learners}


def test_held_out_rows_are_scaled_by_constants():
    pandas = pytest.importorskip("pandas")
    pupils = pandas.DataFrame(
        {"ses": [0.5, -1.0], "meanses": [0.1, 0.2], "minrty": ["Yes", "No"], "sx": ["Female", "Male"]}
        | {"sector": ["Public", "Catholic"], "mAch": [19.0, 5.0], "school": [7, 7]}
    )
    found = convert_hsb(pupils)
    assert found.y.tolist() == [[1.0], [-1.0]]
    assert found.x == pytest.approx(np.array([[0.5, 0.1, 1, 1, 0], [-1, 0.2, 0, 0, 1]]))
    assert found.group.tolist() == [0, 0]
    ratings = pandas.DataFrame(
        {"s": [1, 2], "studage": [2, 8], "lectage": [1, 5], "service": [0, 1], "dept": [1, 15], "y": [5, 1]}
    )
    found = convert_ratings(ratings)
    assert found.y.tolist() == [[2.0], [-2.0]]
    assert found.x[:, :4] == pytest.approx(np.array([[-1, -1, 0, 1], [2, 1, 1, 0]]))
    assert found.x.sum(1).tolist() == [-1, 5]
    assert found.group.tolist() == [0, 1]


def make_row(stream, seed, **means):
    pools = {POOL: {"ftml@5": 0.75}}
    return {
        "asked": {"stream": stream, "rounds": 40, "seed": seed},
        "commit": "abc",
        "mean": means,
        "late": means,
        "weights": pools,
        "seconds": {"ftml": 0.1, POOL: 0.002},
        "regret": {"regret": 1.0, "bound": 2.0},
        "static": 2.0 if stream == "schools_linear" else None,
        "curve": [3.0, 2.0],
    }


def test_the_page_says_which_goals_hold_for_the_mean_and_for_all_seeds():
    rows = [
        make_row("schools_linear", seed, **{POOL: 1.9 + 0.2 * seed, "ftml": 3.0, "ftml@5": 2.0}) for seed in range(2)
    ]
    rows += [make_row("drifting", seed, **{POOL: 2.2 + 0.2 * seed, "ftml": 3.0, "ftml@5": 2.0}) for seed in range(2)]
    assert find_best(rows[0], "late") == "ftml@5"
    text = render({"command": "c", "commit": "abc", "iterations": 40, "rows": rows})
    assert [line.split(" | ", 3)[3] for line in text.splitlines() if line.startswith(("| schools", "| drifting"))] == [
        "from round 20 on, pool / best expert | 1.030 | 1.000 ± 0.050 | holds |",
        "pool minus best fixed start in hindsight, a round | +0.0000 | +0.0000 ± 0.1000 | holds |",
        "from round 20 on, pool / best expert | 1.030 | 1.150 ± 0.050 | **falls short** |",
        "pool / FTML with uniform replay | 0.700 | 0.767 ± 0.033 | **falls short** |",
    ]
    assert "| ftml@5 | 2.0000 ± 0.0000 | 2.0000 ± 0.0000 | 0.75 ± 0.00 |" in text
    assert "| best fixed start in hindsight | 2.0000 ± 0.0000 |" in text
    assert plot(rows).startswith(b"\x89PNG")


def test_the_page_compares_with_rivals_on_held_out_streams():
    rivals = {"pooled_ridge": 2.0, "ridge_head": 2.5, "hierarchical_bayes": 1.0, "gradient_boosting": 1.05, "ftml": 3.0}
    rows = [
        make_row("hsb", seed, **{POOL: 1.0 + 0.1 * seed, DEFAULTS_ONLY: 1.5 + 0.01 * seed, **rivals})
        for seed in range(3)
    ]
    text = render({"command": "c", "commit": "abc", "iterations": 40, "rows": rows})
    width = 4.303 * 0.1 / 3**0.5
    found = {line.split(" | ")[1]: line.split(" | ")[3:] for line in text.splitlines() if line.startswith("| hsb | ")}
    assert found["pooled linear"][:2] == [f"-0.9000 ± {width:.4f}", "ahead"]
    assert found["gradient boosting"] == [
        f"+0.0500 ± {width:.4f}",
        "level",
        f"+0.4600 ± {width / 10:.4f}",
        "**behind** |",
    ]


def test_the_command_writes_the_page(tmp_path, monkeypatch):
    def run_here(jobs, run, asked, write):
        write([run(*arguments) for arguments in asked])

    stream = Stream("Drifting", ROUNDS, make_tasks, make_small_settings, DEFAULTS)
    monkeypatch.setattr(__main__, "run_rows", run_here)
    monkeypatch.setitem(__main__.STREAMS, "drifting", stream)
    arguments = ["--seeds=2", "--only=drifting", "--work", str(tmp_path / "work"), "--out", str(tmp_path)]
    done = CliRunner().invoke(__main__.main, arguments)
    assert done.exit_code == 0, done.output
    result = json.loads((tmp_path / "pool.json").read_text())
    assert [row["asked"]["seed"] for row in result["rows"]] == [0, 1]
    assert (tmp_path / "pool.md").read_text() in done.output
    assert (tmp_path / "pool.png").exists()


LEARNERS_OF = {
    "conv4": ("constant", "ridge_head", "logistic_head"),
    "sinusoid": ("constant", "ridge_head", "pooled_ridge", "hierarchical_bayes"),
}


def test_the_cost_is_that_of_what_plays_by_default():
    for name, work in pool_cost.WORKS.items():
        alone, pooled = (pool_cost.make_settings(work, kind) for kind in (pool_cost.ALONE, pool_cost.POOLED))
        assert (alone.pool.aggregation, alone.regret.baselines, alone.inner.answer_steps) == ("none", (), ())
        assert pooled.pool.aggregation == "auto"
        assert {*pooled.inner.answer_steps} | {pooled.inner.steps} >= {0, 1, 2, 5, 10, 20}
        cheap = LEARNERS_OF[name]
        assert pooled.regret.baselines == ("from_scratch", *cheap)
        assert pooled.regret.options == {"from_scratch": FROM_SCRATCH[name == "conv4"]}
        assert len(work.make()) == work.rounds, name


def test_the_page_of_the_cost_compares_runs_that_took_turns():
    rows = [
        {
            "asked": {"work": "sinusoid", "kind": kind, "run": run, "settings": ""},
            "round": seconds + 0.01 * run,
            "seconds": {"ftml": seconds},
        }
        for kind, seconds in ((pool_cost.ALONE, 0.1), (pool_cost.POOLED, 0.4))
        for run in range(2)
    ]
    text = pool_cost.render({"command": "c", "commit": "abc", "rows": rows})
    assert "| 2 | 105.0 ± 5.0 | 405.0 ± 5.0 | 3.86 ± 0.14 | 3 | **falls short** |" in text
    assert "| ftml | 400.00 ± 0.00 | 3.81 ± 0.00 |" in text
