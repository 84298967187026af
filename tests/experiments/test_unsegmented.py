"""The table of the leader from random weights on streams without task boundaries, at a small size."""

from statistics import mean, stdev

import pytest
import torch
from online_meta.changepoints.segments import Segmenter
from online_meta.changepoints.task_free import make_task
from online_meta.metagrads.exact import exact
from online_meta.regret.scoring import truncate_support

from tests.experiments.segmentation import draw_stream
from tests.experiments.unsegmented import __main__
from tests.experiments.unsegmented.__main__ import average_over_prefixes, build_leader, play, run_row, score_fresh_tasks
from tests.experiments.unsegmented.page import WAYS, render


@pytest.fixture(autouse=True)
def use_small_sizes(monkeypatch):
    for name, value in {"BLOCK": 80, "STEPS": 1, "BATCH": 2, "FRESH": 3, "HOW": "loop"}.items():
        monkeypatch.setattr(__main__, name, value)


def test_rows_are_computed_saved_and_rendered(tmp_path):
    rows = [run_row(way, seed, 160, tmp_path) for way in WAYS for seed in range(2 if way == WAYS[4] else 1)]
    assert len(list(tmp_path.glob("*.json"))) == 6
    kept = {file.name: file.stat().st_mtime_ns for file in tmp_path.iterdir()}
    assert run_row(WAYS[0], 0, 160, tmp_path) == rows[0]
    assert {file.name: file.stat().st_mtime_ns for file in tmp_path.iterdir()} == kept
    _, changes = draw_stream("sinusoid", 0, 160)
    for row in rows[:5]:
        assert [block["samples"] for block in row["blocks"]] == [80, 80]
        assert sum(block["changes"] for block in row["blocks"]) == len(changes)
        assert sum(len(block["losses"]) for block in row["blocks"]) == row["rounds"] > 0
    own, daemon, true, waves, count = rows[:5]
    assert daemon["blocks"] != own["blocks"]
    assert true["rounds"] == len(changes) + 1
    assert [len(block["losses"]) for block in count["blocks"]] == [1, 3], "reported at 50, 100, 150 and 160 samples"
    assert mean(block["purity"] for block in waves["blocks"]) > mean(block["purity"] for block in count["blocks"])
    assert own["blocks"][1]["fresh"] != own["blocks"][0]["fresh"]
    text = render({"command": "c", "commit": "d", "iterations": 160, "rows": rows})
    purities = [row["blocks"][1]["purity"] for row in rows[4:]]
    error = stdev(purities) / 2**0.5
    (line,) = (line for line in text.splitlines() if line.startswith("| cuts by count | 1,000 to 2,000 | "))
    assert f" | {mean(purities):.3f} ± {error:.3f} | " in line
    assert f"cuts by count {mean(row['rounds'] for row in rows[4:]):.0f}" in text


def test_with_true_boundaries_each_task_is_learned_after_its_last_sample(monkeypatch):
    late = Segmenter(lambda: 0, lambda met, x, y: met + 1, lambda met: 25 if met == 40 else None)
    monkeypatch.setattr(__main__, "run_length", lambda likelihood, **options: late)
    stream, changes = draw_stream("sinusoid", 8, 200)
    learner = build_leader(8)
    learned = []
    score = learner.score
    learner.score = lambda task, prefixes=(): learned.append(task) or score(task, prefixes)
    ends = [*changes, 200]
    for report in play("true boundaries", learner, stream, changes):
        assert len(learned) == learner.round == sum(end <= report.segment.detected_at for end in ends)
    for task, begin, end in zip(learned, [0, *changes], ends, strict=True):
        whole = make_task(stream[begin:end])
        assert torch.equal(task.support.x, whole.support.x)
        assert torch.equal(task.query.y, whole.query.y)


def test_the_gradient_over_prefixes_is_the_mean_of_their_gradients():
    learner = build_leader(0)
    stream, _ = draw_stream("sinusoid", 0, 10)
    task, meta, one = make_task(stream), learner.engine.meta(), exact(learner.inner)
    found = average_over_prefixes(one, (1, 2, 5, 10))(meta, task)
    shorter = [one(meta, truncate_support(task, size)) for size in (1, 2, 5)]
    for part in (0, 1):
        for name, value in found.grads[part].items():
            torch.testing.assert_close(value, sum(share.grads[part][name] for share in shorter) / 3)
    torch.testing.assert_close(found.loss, sum(share.loss for share in shorter) / 3)


def test_learning_lowers_the_loss_on_fresh_tasks(monkeypatch):
    monkeypatch.setattr(__main__, "STEPS", 10)
    learner = build_leader(0)
    before = score_fresh_tasks(learner, 0)
    stream, changes = draw_stream("sinusoid", 0, 500)
    assert len(list(play("cuts by linear, 50 waves", learner, stream, changes))) == len(changes) + 1
    assert score_fresh_tasks(learner, 0) < before
