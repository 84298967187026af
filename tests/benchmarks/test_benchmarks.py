"""The parts of the benchmark are correct; the peers need not be installed."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch

import online_meta as om
from online_meta.batching.autotune import relative_error
from online_meta.tree import to_float64
from tests.benchmarks.answers import ONE, POOL
from tests.benchmarks.answers import draw as draw_answers
from tests.benchmarks.answers import render as render_answers
from tests.benchmarks.contestants import CONTESTANTS, prepare_unrolled, stack_tasks
from tests.benchmarks.goals import format_verdict
from tests.benchmarks.growth import fit_exponent
from tests.benchmarks.networks import Transformer, conv4
from tests.benchmarks.plot import draw
from tests.benchmarks.race import compute_reference, mark_wrong, race
from tests.benchmarks.table import render
from tests.benchmarks.works import WORKS, Goal, image_task, sequence_task

SMALL = {
    "sinusoid": WORKS["sinusoid_k5"]._replace(steps=3, timed=3, tasks=3),
    "conv4": WORKS["conv4_5way_4tasks"]._replace(
        module=partial(conv4, 3, filters=4, side=16), task=partial(image_task, 3, 2, 2, side=16), steps=2, timed=2
    ),
    "transformer": WORKS["transformer_k32"]._replace(
        module=partial(Transformer, 3, 4, width=8, heads=4, hidden=16, layers=4),
        task=partial(sequence_task, 2, 4, 3),
        steps=3,
    ),
}


@pytest.fixture(params=SMALL)
def work(request):
    return SMALL[request.param]


def test_the_unrolled_loop_and_the_reference_equal_the_exact_meta_gradient(work, monkeypatch):
    monkeypatch.setattr(torch, "zeros", partial(torch.zeros, dtype=torch.float64))
    weights = {name: value.double() for name, value in work.weights().items()}
    tasks = [to_float64(work.task(seed)) for seed in range(work.timed)]
    inner = om.Inner(om.model_loss(work.module(), work.loss), om.rules.sgd(lr=work.lr), work.steps)
    right = om.over_tasks(om.exact(inner), "loop")(inner.init(weights), tasks)
    call = prepare_unrolled(work, weights, tasks, Path())
    assert relative_error(call(), right) < 1e-12
    assert relative_error(call(), right) < 1e-12, "a second call starts from the same state"
    assert relative_error(compute_reference(work, weights, tasks), right) < 1e-12
    assert relative_error(compute_reference(work._replace(reference="adjoint"), weights, tasks), right) < 1e-12
    assert (
        relative_error(prepare_unrolled(work, weights, tasks[:1], Path())(), _compute_exact(inner, weights, tasks[:1]))
        < 1e-12
    )
    shorter = inner.__class__(inner.loss, inner.rule, work.steps - 1)
    assert relative_error(_compute_exact(shorter, weights, tasks), right) > 1e-4, "one step less makes a difference"


def test_a_race_returns_correct_rows_and_names_failed_contestants(work, tmp_path):
    absent = ("ours, loop", "unrolled", "nobody")
    found = race(work._replace(contestants=absent, rounds=2), 2, tmp_path, lambda what: None)
    ours, theirs, nobody = found["rows"]
    assert (ours["contestant"], theirs["contestant"]) == absent[:2]
    assert max(ours["error"], theirs["error"]) < 1e-4
    assert len(ours["raw"]) == 2
    assert min(ours["raw"]) > 0
    assert ours["bytes"] > 0
    assert nobody == {"contestant": "nobody", "failed": "KeyError: 'nobody'"}


def test_all_batching_modes_get_the_same_tasks(tmp_path):
    work = SMALL["sinusoid"]
    tasks = [work.task(seed) for seed in range(3)]
    assert stack_tasks(tasks).support.x.shape == (3, 10, 1)
    one, other = (CONTESTANTS[f"ours, {how}"](work, work.weights(), tasks, tmp_path)() for how in ("loop", "vmap"))
    assert relative_error(one, other) < 1e-5


def test_wrong_results_are_marked_and_not_compared():
    rows = [{"contestant": "unrolled", "error": 1e-6}, {"contestant": "JAX", "error": 0.02}]
    mark_wrong(rows)
    assert "failed" not in rows[0]
    assert rows[1]["failed"].startswith("wrong: its error is 2.0e-02")
    rows = [{"contestant": "JAX", "error": float("nan")}]
    mark_wrong(rows)
    assert "failed" in rows[0]


def _make_result(seconds, grown=1.0):
    row = {"spread": 0.01, "raw": [1.0], "calls": 1, "first_call": 2.0, "compiling": None, "error": 1e-7}
    row |= {"bytes": 1000, "bytes_by": "live tensors"}
    rows = [
        row | {"contestant": "ours, loop", "seconds": seconds},
        row | {"contestant": "unrolled", "seconds": 2.0},
        {"contestant": "JAX", "failed": "ModuleNotFoundError: No module named 'jax'"},
    ]
    goals = [Goal("ours, loop", "seconds", "unrolled", 0.5), Goal("ours, loop", "seconds", "JAX", 0.7)]
    work = {"title": "A work", "tasks": 4, "timed": 2, "scale": 2.0, "rows": rows}
    about = {"command": "make bench", "commit": "abc", "wall_seconds": 60.0, "plot": "bench.png", "versions": {}}
    about["machine"] = {"processor": "one", "system": "Linux", "load_before": 0.1}
    peaks = {"ours, loop": [10, 20], "ours, rematerialised": [10, 12]}
    growth = {"steps": [8, 16], "parameters": 1, "peaks": peaks, "per_step": grown, "exponent": 0.5}
    growth["goals"] = {"per_step": 1.1, "exponent": 0.6}
    works = {"a": work | {"goals": [goal._asdict() for goal in goals]}}
    return {"about": about, "works": works, "imports": {"torch": 1.0}, "growth": growth}


def test_the_table_states_which_goals_are_met_and_by_how_much_others_are_missed():
    met, missed = render(_make_result(1.0)), render(_make_result(1.2, grown=2.2))
    assert "| time of ours, loop / unrolled | 0.5 | 0.5 | met |" in met
    assert "missed" not in met
    assert "| time of ours, loop / unrolled | 0.6 | 0.5 | **missed**: 1.20 times the goal |" in missed
    assert "| 2.2 | 1.1 | **missed**: 2.00 times the goal |" in missed
    assert "| time of ours, loop / JAX | - | 0.7 | not measured |" in met
    assert "No module named 'jax'" in met
    assert "2 of the 4 tasks" in met
    assert format_verdict(None, 1.0) == "not measured"


def test_every_line_of_a_table_has_all_columns():
    tables = [line for line in render(_make_result(1.0)).splitlines() if line.startswith("|")]
    assert {line.count("|") for line in tables} <= {4, 5, 12}
    assert sum(line.count("|") == 12 for line in tables) == 5


def test_the_picture_is_drawn_and_the_result_is_plain_data():
    result = _make_result(1.0)
    assert draw(result).startswith(b"\x89PNG")
    assert json.loads(json.dumps(result)) == result


@pytest.mark.parametrize("power", [0.5, 1.0])
def test_the_exponent_of_growth_is_found_above_a_constant(power):
    steps = (8, 16, 32, 64, 128)
    assert fit_exponent(steps, [5000 + 100 * k**power for k in steps]) == pytest.approx(power, abs=0.01)


def _compute_exact(inner, weights, tasks):
    return om.over_tasks(om.exact(inner), "loop")(inner.init(weights), tasks)


def test_the_page_of_answers_compares_each_figure_with_its_goal():
    measured = {"rate": [700.0, 500.0, 650.0], "pace_alone": [10.0, 20.0, 30.0], "pace_loaded": [9.0, 10.0, 12.0]}
    times = ("p50", "p99", "json_rate", "json_p99", "idle_rate", "idle_p99")
    found = {**measured, **{name: [0.05] for name in times}}
    machine = {"processor": "two cores", "load_before": 0.0}
    taken = {"alone": [0.001, 0.002], "loaded": [0.003]}
    result = {"command": "c", "commit": "a", "machine": machine, "seconds": 1, "ingest": taken}
    result |= {"answers": {ONE: found, POOL: found}}
    assert draw_answers(result).startswith(b"\x89PNG")
    page = render_answers(result)
    assert "| answers per second | 650 | 500 to 700 | at least 600 | met |" in page
    assert "| answers per second | 650 | 500 to 700 | at least 100 | met |" in page
    assert "| milliseconds to an answer, p99 | 50 | 50 to 50 | at most 25 | **missed**: 2.00 times the goal |" in page
    assert "| pace of training with the load / without | 0.5 | 0.4 to 0.9 | at least 0.6 | **missed**" in page
