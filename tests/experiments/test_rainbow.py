"""The table of rainbow digits by the protocol of Follow the Meta-Leader, at a small size."""

import json
from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner
from online_meta.functional.randomness import checksum
from online_meta.learners import MemoryReplayBuffer
from online_meta.regret.ledger import MAIN_LEARNER
from online_meta.regret.scoring import answer_as_scored
from online_meta.types import Batch, Meta, Task
from trainers.build import build_context, build_learners
from trainers.settings import AnswerRuleSettings

from tests.experiments.common.playing import TUNED, Training, train_leader
from tests.experiments.rainbow import pool, runs
from tests.experiments.rainbow.__main__ import main
from tests.experiments.rainbow.page import BY_SIZE, compute_efficiency, plot, read_other_rows, render
from tests.experiments.rainbow.pool import Play, make_pool_settings, play_pool, run_pool
from tests.experiments.rainbow.runs import (
    DRAWS,
    Entry,
    MinibatchBuffer,
    digits_mlp,
    make_settings,
    make_tasks,
    run_entry,
)


def make_row(label, seed, *curves):
    points = (10, 100, 900)
    pairs = [[[count, right] for count, right in zip(points, curve, strict=True)] for curve in curves]
    return {"asked": {"label": label, "seed": seed}, "curves": pairs, "seconds": 60.0}


def test_images_are_shuffled_and_support_and_query_are_disjoint():
    task, again = make_tasks(0, 2)[1], make_tasks(0, 2)[1]
    assert torch.equal(task.support.x, again.support.x)
    assert torch.equal(task.support.y.bincount(), torch.full((10,), 90))
    assert len(task.support.y[:50].unique()) > 5
    learned = {image.numpy().tobytes() for image in task.support.x}
    assert not learned & {image.numpy().tobytes() for image in task.query.x}


def test_every_access_to_a_past_task_draws_new_disjoint_minibatches():
    whole = Batch(torch.arange(900), torch.arange(900))
    buffer, again = MinibatchBuffer(3), MinibatchBuffer(3)
    for one in (buffer, again):
        one.add(0, Task(whole, whole))
    draws = [buffer[0] for _ in range(50)]
    assert torch.equal(draws[0].support.x, again[0].support.x)
    assert all((len(draw.support.x), len(draw.query.x)) == DRAWS for draw in draws)
    assert all(not set(draw.support.x.tolist()) & set(draw.query.x.tolist()) for draw in draws)
    seen = torch.cat([draw.support.x for draw in draws])
    assert len(seen.unique()) > 500
    assert 350 < float(seen.double().mean()) < 550


def test_the_network_ignores_the_colour_of_a_plain_background():
    network = digits_mlp()
    grounds = torch.tensor([[255, 0, 0], [75, 0, 130]], dtype=torch.uint8)[:, :, None, None].expand(2, 3, 28, 28)
    first, second = network(grounds)
    assert torch.allclose(first, second, atol=1e-5)


@pytest.mark.parametrize("label", ["FTML", "MOML", "online Reptile"])
def test_a_run_is_scored_after_the_warm_up_and_saved(label, tmp_path, monkeypatch):
    usual = runs.make_settings(label, 0)
    meta, regret = (
        replace(usual.meta, steps_per_round=1, batch=2),
        replace(usual.regret, options={"moml": {"steps": 2}}),
    )
    options = regret if label == "MOML" else usual.regret
    quick = replace(usual, meta=meta, regret=options, engine=replace(usual.engine, batching="loop"))
    monkeypatch.setattr(runs, "make_settings", lambda label, seed: quick)
    monkeypatch.setattr(runs, "WARM_UP", 1)
    (tmp_path / "programs").mkdir()
    found = run_entry(Entry(label, 3, 0), tmp_path)
    assert [[points for points, _ in curve] for curve in found["curves"]] == [[10, 20, 50, 100, 200, 400, 900]] * 2
    assert len(found["tuned"]) == (2 if label == "FTML" else 0), "one for each scored task"
    monkeypatch.setattr(runs, "make_tasks", None)
    assert run_entry(Entry(label, 3, 0), tmp_path) == found


def test_a_leader_is_trained_as_from_scratch_trains_random_weights():
    settings, task = make_settings("from scratch", 0), make_tasks(0, 1)[0]
    few = task._replace(support=Batch(*(values[:30] for values in task.support)))
    setup = build_context(settings, MemoryReplayBuffer())
    learners = build_learners(settings, replace(setup, start=Meta(setup.draw_weights(checksum(few.support)), {})))
    training = Training(**runs.OPTIONS["from_scratch"])
    found = train_leader(settings, training, learners[MAIN_LEARNER], few)
    right = learners["from_scratch"].score(few)
    assert (found.loss_after, found.accuracy) == (right.loss_after, right.accuracy)
    assert found.prefixes[0].accuracy != found.accuracy
    with pytest.raises(TypeError, match="a FunctionalLearner has no leader"):
        train_leader(settings, training, learners["from_scratch"], few)


def test_the_table_has_the_points_needed_and_the_share_of_tasks_reached():
    good = make_row("FTML", 0, (0.5, 0.85, 0.95), (0.9, 0.92, 0.91))
    other = make_row("FTML", 1, (0.5, 0.6, 0.7), (0.8, 0.95, 0.95))
    assert compute_efficiency(good, 0.9) == pytest.approx((0.93, 1.0, 455.0))
    assert compute_efficiency(other, 0.9) == pytest.approx((0.825, 0.5, 500.0))
    rows = [good, other, make_row("MOML", 0, (0.1, 0.2, 0.3), (0.1, 0.2, 0.5))]
    lines = render({"command": "c", "commit": "abc", "iterations": 22, "rows": rows}).splitlines()
    shown = [line for line in lines if line.startswith(("| FTML", "| MOML"))]
    assert shown[0].startswith("| FTML | 2 | 87.8% ± 5.2% | 82.5% ± 12.5% | 93.0% ± 2.0% | 478 ± 22 | 75% ± 25% | ")
    assert shown[1] == "| MOML | 1 | 40.0% | 30.0% | 50.0% | 900 | 0% | 900 | 0% | 60 |"
    assert plot(rows).startswith(b"\x89PNG")


def test_the_row_of_the_trained_leader_follows_that_of_ftml():
    curves = make_row("FTML", 0, (0.5, 0.9, 1.0), (0.9, 0.9, 1.0))["curves"]
    run = make_row("FTML", 0, (0.5, 0.6, 0.7), (0.8, 0.95, 0.95)) | {"tuned": curves}
    lines = render({"command": "c", "commit": "abc", "iterations": 22, "rows": [run]}).splitlines()
    at = next(place for place, line in enumerate(lines) if line.startswith("| FTML |"))
    assert lines[at + 1] == f"| {TUNED} | 1 | 100.0% | 100.0% | 100.0% | 55 | 100% | 55 | 100% | - |"
    assert "; 1 minutes of one core" in "\n".join(lines), "the time is not counted twice"


def shorten(task, images):
    return task._replace(support=Batch(*(values[:images] for values in task.support)))


def test_a_pool_has_bayes_weights_from_the_losses_of_earlier_tasks_for_all_sizes_or_for_each(tmp_path, monkeypatch):
    usual = make_pool_settings(0)
    settings = replace(
        usual,
        inner=replace(usual.inner, answer_steps=(0, 20), answer_rules={"adam": AnswerRuleSettings((3,), 0.005)}),
        meta=replace(usual.meta, steps_per_round=1, batch=2),
        engine=replace(usual.engine, batching="loop"),
    )
    heard = []

    def hear(learner, task, prefixes):
        heard.append(answer_as_scored(learner, task, prefixes))
        return heard[-1]

    monkeypatch.setattr(pool, "answer_as_scored", hear)
    tasks = [shorten(task, 40) for task in make_tasks(0, 3)]
    found = play_pool(settings, tasks, tmp_path, warm_up=1)
    sizes, learners = [10, 20, 40], len(heard) // 3
    assert (learners, len(found.experts)) == (3, 1 + 2 + len(pool.HEADS) + 1 + 2)
    behind, right = dict.fromkeys(sizes, 0.0), []
    for t, task in enumerate(tasks):
        own = heard[t * learners : (t + 1) * learners]
        each = {
            size: torch.stack([p[0].outputs[0].double().softmax(1) for one in own for p in _at(one, size).values()])
            for size in sizes
        }
        weights = {size: torch.as_tensor(-behind[size]).softmax(0) if t else None for size in sizes}
        if t:
            right.append([[_accuracy(each[n], weights[m], task) for m in (40, n)] for n in sizes])
        for size, probabilities in each.items():
            behind[size] = behind[size] - probabilities[:, torch.arange(100), task.query.y].log().mean(1)
    assert found.curves == [[[n, one[0]] for n, one in zip(sizes, row, strict=True)] for row in right]
    assert found.by_size == [[[n, one[1]] for n, one in zip(sizes, row, strict=True)] for row in right]
    assert found.curves != found.by_size
    assert [*found.weights] == sizes
    assert [*found.weights[20].values()] == pytest.approx((-behind[20]).softmax(0).tolist())


def _at(answers, size):
    return dict(answers.parts).get(size, answers.whole)


def _accuracy(probabilities, weights, task):
    mixed = (weights[:, None, None] * probabilities).sum(0)
    return float((mixed.argmax(1) == task.query.y).double().mean())


def make_pool_run(seed, *curves):
    row = make_row("pool", seed, *curves)
    summary = {"accuracy": [0.5, 0.8, 0.9], "points": [900, 100], "reached": [0.5, 1.0]}
    weights = {"10": {"ftml": 0.25, "from_scratch": 0.75}, "900": {"ftml": 1.0}}
    return row | {"by_size": row["curves"], "experts": {"ftml": summary, "from_scratch": summary}, "weights": weights}


def test_a_run_of_the_pool_is_summarized_and_saved(tmp_path, monkeypatch):
    curves = make_row("pool", 0, (0.5, 0.85, 0.95), (0.7, 0.75, 0.85))["curves"]
    weights = {10: {"ftml": 1.0, "ftml@0": 1e-9}}
    monkeypatch.setattr(pool, "make_tasks", lambda seed, rounds: [])
    monkeypatch.setattr(pool, "play_pool", lambda *given: Play(curves, curves, {"ftml": curves}, weights, 60.0))
    found = run_pool(Entry("pool", 22, 0), tmp_path)
    expert = found["experts"]["ftml"]
    assert expert["accuracy"] == pytest.approx([0.6, 0.8, 0.9])
    assert (expert["points"], expert["reached"]) == ([900.0, 500.0], [0.5, 1.0])
    assert found["weights"] == {"10": {"ftml": 1.0}}
    monkeypatch.setattr(pool, "play_pool", None)
    assert run_pool(Entry("pool", 22, 0), tmp_path) == found


def test_the_page_says_whether_the_pool_reaches_its_goals():
    ftml = make_row("FTML", 0, (0.5, 0.6, 0.7), (0.8, 0.95, 0.95)) | {"commit": "abc"}
    good = make_pool_run(0, (0.5, 0.85, 0.9), (0.9, 0.92, 0.91)) | {"commit": "def"}
    poor = make_pool_run(0, (0.5, 0.6, 0.9), (0.5, 0.6, 0.7)) | {"commit": "def"}
    text = render({"command": "c", "commit": "def", "iterations": 22, "rows": [ftml, good]})
    assert "commit abc made the rows of FTML; commit def made the rows of pool" in text
    lines = text.splitlines()
    assert "| pool | points to 80%: at most 0.8 of FTML's, 364 | 55 | holds |" in lines
    assert f"| {BY_SIZE} | 90% reached: on at least 85% of the tasks | 100.0% | holds |" in lines
    assert "| from_scratch | 900 | 50% | 100 | 0.75, 0.00 |" in lines
    lines = render({"command": "c", "commit": "def", "iterations": 22, "rows": [ftml, poor]}).splitlines()
    assert "| pool | points to 80%: at most 0.8 of FTML's, 364 | 900 | **falls short** |" in lines
    assert "| pool | 90% reached: on at least 85% of the tasks | 50.0% | **falls short** |" in lines
    assert plot([ftml, good]).startswith(b"\x89PNG")


def test_rows_of_other_learners_can_be_kept(tmp_path):
    rows = [make_row(label, seed, (0.5, 0.6, 0.7)) for label in ("FTML", "pool") for seed in (0, 1)]
    for row in rows:
        row["asked"]["rounds"] = 56
    (tmp_path / "table.json").write_text(json.dumps({"rows": rows}))
    assert read_other_rows(tmp_path / "table.json", 56, ["pool"]) == rows[:2]
    assert read_other_rows(tmp_path / "table.json", 40, ["pool"]) == []


def test_the_command_refuses_runs_without_scored_tasks(tmp_path):
    found = CliRunner().invoke(main, ["--rounds", "20", "--work", str(tmp_path), "--out", str(tmp_path)])
    assert found.exit_code == 2
    assert "more than the 20 of the warm-up" in found.output
