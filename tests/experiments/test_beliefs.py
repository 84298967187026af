"""The tables of beliefs: their rows are made anew on a few rounds, and their figures are those of the answers."""

from functools import partial

import pytest
import torch
from online_meta.outcomes import gaussian_of_noise
from online_meta.prediction import mean_of, point
from streams.sources import ambiguous_functions

from tests.experiments import bayes, neural_processes
from tests.experiments.beliefs import runs
from tests.experiments.beliefs.page import Bar, draw, judge
from tests.experiments.beliefs.table import compose, render_table

TABLES = {table.name: table for table in (bayes.TABLE, neural_processes.TABLE)}
ROUNDS = 2


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(runs, "BATCHING", "loop")
    monkeypatch.setattr(runs, "HELD_OUT", 3)
    monkeypatch.setattr(runs, "CURVE_TASKS", 2)
    monkeypatch.setattr(runs, "BATCH", 2)


@pytest.mark.parametrize("name", TABLES)
def test_the_configuration_of_every_contestant_can_be_read(name):
    table = TABLES[name]
    for contestant in table.contestants.values():
        assert runs.make_settings(table.source, contestant, 0).seed == 0
    assert {bar.name for bar in table.bars} <= table.contestants.keys()


@pytest.mark.parametrize(("name", "label"), [("bayes", "platipus"), ("neural_processes", "cnp")])
def test_a_row_is_made_anew_and_reused(name, label, tmp_path):
    table = TABLES[name]
    play = partial(runs.run, table.source, label, table.contestants[label], 0, ROUNDS, tmp_path / "work")
    row = play()
    assert (len(row["excess"]), sum(row["pit"]), len(row["curve"])) == (3, sum(row["bayes_pit"]), ROUNDS)
    saved = next(tmp_path.glob("work/*.json")).stat().st_mtime_ns
    assert play() == row
    assert next(tmp_path.glob("work/*.json")).stat().st_mtime_ns == saved
    result = compose(table, [row])
    assert table.contestants[label].title in render_table(table, result)
    assert draw([row]).startswith(b"\x89PNG")


class Knowing:
    """Answers by the exact predictor, with its mean and a noise of its own or as it is."""

    def __init__(self, predict, sigma=None):
        self.predict, self.sigma = predict, sigma

    def state(self):
        return {}

    def answers(self, state, support, x):
        exact = self.predict(support, x)
        return {"": exact if self.sigma is None else point(gaussian_of_noise.build(sigma=self.sigma), mean_of(exact))}


def test_who_knows_the_exact_answer_is_0_nats_above_it_and_who_is_too_sure_is_not():
    options = ambiguous_functions.Settings()
    predict = ambiguous_functions.oracle(options)
    tasks = [ambiguous_functions.make_task(options, 7, t) for t in range(6)]
    exact = [predict(task.support, task.query.x) for task in tasks]
    found = runs.measure(Knowing(predict), tasks, exact)
    torch.testing.assert_close(torch.tensor(found["excess"]), torch.zeros(6), rtol=0, atol=1e-6)
    assert found["pit"] == found["bayes_pit"]
    assert found["mse"] == pytest.approx(found["bayes_mse"])
    sure = runs.measure(Knowing(predict, 0.1), tasks, exact)
    assert sum(sure["excess"]) / 6 > 0.1


def test_a_bar_counts_each_seed_in_which_all_of_its_rows_are_there():
    known = [(0, "a", 1.0), (0, "b", 3.0), (1, "a", 2.0)]
    rows = [{"asked": {"name": name, "seed": seed}, "x": x} for seed, name, x in known]
    bars = [
        Bar("a", "x", 1.4, None, lambda of: of["a"]["x"]),
        Bar("b", "difference", None, 1.0, lambda of: of["b"]["x"] - of["a"]["x"]),
        Bar("c", "missing", None, 1.0, lambda of: of["c"]["x"]),
    ]
    single, pair = judge(rows, bars, "command")
    assert (single["seeds"], single["value"], single["met"], single["command"]) == (2, 1.5, True, "command")
    assert (pair["seeds"], pair["value"], pair["met"], pair["interval"]) == (1, 2.0, False, None)


def test_a_whole_interval_has_to_pass_a_bar_that_asks_for_it():
    """With two seeds, the 97.5 % quantile of Student's t is 12.706."""

    def judge_values(*values):
        rows = [{"asked": {"name": "a", "seed": seed}, "x": x} for seed, x in enumerate(values)]
        (found,) = judge(rows, [Bar("a", "x", 0.0, None, lambda of: of["a"]["x"], whole=True)], "command")
        return found

    wide, narrow = judge_values(1.0, 2.0), judge_values(1.4, 1.6)
    assert wide["interval"] == pytest.approx([1.5 - 12.706 * 0.5, 1.5 + 12.706 * 0.5], rel=1e-4)
    assert (wide["met"], narrow["met"]) == (False, True)
    assert not judge_values(0.0, 0.0)["met"], "to be level is not to be ahead"
    assert not judge_values(5.0)["met"]
