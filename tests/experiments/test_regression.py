"""The table of regression streams, at a small size."""

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from online_meta.learners import MemoryReplayBuffer
from online_meta.types import Batch, Task
from trainers.build import build_context, build_learners
from trainers.comparators import RefreshRequest, closed_form

from tests.experiments.regression import __main__, runs
from tests.experiments.regression.data import Sizes, draw_tasks, flight_samples, load_flights, load_pupils
from tests.experiments.regression.page import plot, render
from tests.experiments.regression.runs import (
    COMPARATOR,
    LEARNERS,
    STREAMS,
    Choice,
    Entry,
    Stream,
    compare,
    make_settings,
    run_entry,
)
from tests.experiments.regression.tuning import get_choice

pandas = pytest.importorskip("pandas")
SIZES = Sizes(4, 6)


def make_flights(rows=400):
    random = np.random.default_rng(0)
    days = np.arange(rows) // 10
    return pandas.DataFrame(
        {
            "month": 1 + days // 28,
            "day": 1 + days % 28,
            "hour": random.integers(5, 23, rows),
            "minute": random.integers(0, 60, rows),
            "dep_delay": random.normal(10, 40, rows),
            "arr_delay": random.normal(5, 40, rows),
            "distance": random.integers(100, 3000, rows),
            "origin": random.choice(["EWR", "JFK", "LGA"], rows),
            "carrier": random.choice(["AA", "UA"], rows),
        }
    )


def are_equal(one, other):
    return all(
        torch.equal(a, b) for a, b in zip((*one.support, *one.query), (*other.support, *other.query), strict=True)
    )


def make_row(stream, label, seed, **figures):
    asked = {"stream": stream, "label": label, "rounds": 10, "seed": seed, "choice": vars(Choice(0.1))}
    return {"asked": asked, "seconds": 60.0, "curve": [figures.get("total", 0.0)], **figures}


def make_played_row(stream, label, seed, total):
    learned = {"prefixes": {"1": 2.0, "20": 1.0}, "reached": 0.5, "points": 3.0, "round_seconds": 0.002}
    return make_row(stream, label, seed, total=total, mean=total / 10, half=0.25, **learned)


def test_flights_are_ordered_by_time_and_no_flight_is_twice_in_a_task():
    samples = load_flights()
    assert len(samples.y) == 327_346
    numbered = samples._replace(x=np.arange(len(samples.y), dtype=np.float32)[:, None])
    weeks = []
    for task in draw_tasks(numbered, Sizes(20, 50), 0, 40):
        rows = [int(x) for part in task for x in part.x[:, 0]]
        assert len({*rows}) == 70, "support and query are disjoint"
        ((week, _),) = {(samples.time[r], samples.group[r]) for r in rows}
        assert torch.equal(task.query.y, torch.from_numpy(samples.y[rows[20:]]))
        weeks.append(week)
    assert weeks == sorted(weeks)
    assert 0 < weeks[-1] < 5


def test_tasks_do_not_depend_on_later_flights():
    frame = make_flights()
    tasks = draw_tasks(flight_samples(frame), SIZES, 0, 11)
    later = frame["day"] + 28 * (frame["month"] - 1) > 21
    assert 0 < later.sum() < len(frame)
    changed = frame.copy()
    changed.loc[later, ["dep_delay", "arr_delay"]] = 1000.0
    changed.loc[later, "distance"] = 5
    again = draw_tasks(flight_samples(changed), SIZES, 0, 11)
    assert [are_equal(*pair) for pair in zip(tasks, again, strict=True)] == [True] * 6 + [False] * 5


def test_flights_are_scaled_by_constants():
    frame = make_flights(2)
    frame["arr_delay"], frame["dep_delay"], frame["distance"] = [-90.0, 30.0], [15.0, 999.0], [1000, 1750]
    frame["origin"], frame["hour"], frame["minute"] = ["JFK", "EWR"], [6, 17], [0, 60]
    samples = flight_samples(frame)
    assert samples.y.tolist() == [[-2.0], [1.0]]
    assert samples.x == pytest.approx(np.array([[0.5, 0, 1, 0, 1, 0], [6.0, 1, -1, 0, 0, 0]]), abs=1e-6)
    frame["arr_delay"] = [float("nan"), 1.0]
    assert len(flight_samples(frame).y) == 1, "a flight that never arrived"


def test_the_seed_determines_the_order_of_schools():
    one, again, other = (draw_tasks(load_pupils(), Sizes(10, 10), seed, 500) for seed in (0, 0, 1))
    assert are_equal(one[3], again[3])
    assert not are_equal(one[3], other[3])
    with pytest.raises(ValueError, match="501 rounds are requested, but only 500 tasks have 20 samples"):
        draw_tasks(load_pupils(), Sizes(10, 10), 0, 501)


def test_the_regret_of_a_toy_problem_is_exact(tmp_path):
    """Without features the one weight is a constant; a step moves it from w to w - 2 lr (w - support mean)."""
    means = [1.0, 3.0]
    tasks = [
        Task(Batch(torch.zeros(2, 1), torch.full((2, 1), mean)), Batch(torch.zeros(2, 1), torch.full((2, 1), mean)))
        for mean in means
    ]
    stream = Stream("toy", lambda seed, rounds: tasks, 1, (), 1.0)
    settings = make_settings(Entry("schools_linear", COMPARATOR, 2, 0), Choice(0.1))
    settings.model.args["inputs"] = 1
    found = compare(tmp_path, stream, settings, tasks)
    left = (1 - 2 * 0.1) ** (2 * settings.inner.steps)
    assert found["static"] == pytest.approx(left * sum((2.0 - mean) ** 2 for mean in means))
    assert found["dynamic"] == pytest.approx(0.0, abs=1e-9)


def test_the_static_comparator_equals_that_of_the_trainer(tmp_path):
    stream = STREAMS["schools_linear"]
    settings = make_settings(Entry("schools_linear", COMPARATOR, 10, 0), Choice(0.05))
    tasks, buffer = stream.make(0, 10), MemoryReplayBuffer()
    for t, task in enumerate(tasks):
        buffer.add(t, task)
    answered = closed_form.refresh(build_context(settings, buffer), settings.regret, RefreshRequest(10), None)
    found = compare(tmp_path, stream, settings, tasks)
    assert found["static"] == found["curve"][-1] == pytest.approx(answered.comparator.cumulative_loss)
    assert 0 < found["dynamic"] < found["static"]


@pytest.mark.parametrize("stream", STREAMS)
def test_each_learner_can_be_built_with_its_choice(stream):
    for label in STREAMS[stream].labels:
        settings = make_settings(Entry(stream, label, 10, 3), get_choice(stream, label))
        assert LEARNERS[label][0] in build_learners(settings, build_context(settings, MemoryReplayBuffer()))
    assert get_choice(stream, COMPARATOR) == get_choice(stream, "ftml")


def test_a_finished_run_is_loaded(tmp_path, monkeypatch):
    entry = Entry("schools_linear", "aruba", 10, 0)
    found = run_entry(entry, Choice(0.01, 0.1, {"eps": 0.05}, "sgd"), tmp_path)
    assert found["curve"] == [found["total"]]
    assert found["mean"] == pytest.approx(found["total"] / 10)
    assert found["prefixes"].keys() == {"1", "2", "5", "10"}
    monkeypatch.setattr(runs, "play", None)
    assert run_entry(entry, Choice(0.01, 0.1, {"eps": 0.05}, "sgd"), tmp_path) == found
    with pytest.raises(TypeError):
        run_entry(entry, Choice(0.01, 0.1, {"eps": 0.01}, "sgd"), tmp_path)


def test_the_table_compares_seed_by_seed():
    rows = [make_played_row("schools_linear", "ftml", seed, 10.0 + seed) for seed in range(2)]
    rows += [make_played_row("schools_linear", "moml", seed, 12.0 + 3 * seed) for seed in range(2)]
    rows += [make_row("schools_linear", COMPARATOR, seed, static=8.0, dynamic=5.0 + seed) for seed in range(2)]
    text = render({"command": "c", "commit": "abc", "iterations": 10, "rows": rows})
    lines = [line for line in text.splitlines() if line.startswith(("| ftml", "| moml", "| schools_linear | moml"))]
    assert lines == [
        "| ftml | 2 | 1.0500 ± 0.0500 | 0.2500 ± 0.0000 |  | +2.50 ± 0.50 | +5.00 ± 0.00 | 2 ± 0 |",
        "| moml | 2 | 1.3500 ± 0.1500 | 0.2500 ± 0.0000 | +3.00 ± 1.00 | +5.50 ± 1.50 | +8.00 ± 1.00 | 2 ± 0 |",
        "| ftml | 2 ± 0 | 1 ± 0 | 50 ± 0 | 3.0 ± 0.0 |",
        "| moml | 2 ± 0 | 1 ± 0 | 50 ± 0 | 3.0 ± 0.0 |",
        "| schools_linear | moml | 0.1 | 0.01, adam |  |",
    ]
    assert "loses 0.8000 ± 0.0000 per round; each task's own best loses 0.5500 ± 0.0500 per round" in text
    assert "; 6 minutes of one core" in text
    assert plot(rows).startswith(b"\x89PNG")


def test_the_command_writes_the_table(tmp_path, monkeypatch):
    monkeypatch.setattr(__main__, "run_rows", run_in_this_process)
    asked = ["--rounds=10", "--seeds=1", "--stream=schools_linear", "--only=aruba", "--only=comparator"]
    paths = ["--work", str(tmp_path / "work"), "--out", str(tmp_path / "out")]
    ended = CliRunner().invoke(__main__.main, [*asked, *paths], catch_exceptions=False)
    assert "| aruba | 1 | " in ended.output
    written = json.loads((tmp_path / "out" / "regression_streams.json").read_text())
    assert [kept["asked"]["label"] for kept in written["rows"]] == ["aruba", COMPARATOR]
    assert (tmp_path / "out" / "regression_streams.png").read_bytes().startswith(b"\x89PNG")


def run_in_this_process(jobs, run, asked, write):
    write([run(*arguments) for arguments in asked])
