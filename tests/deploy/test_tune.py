"""Looking for better settings on a history: what is tried, what decides, and what is printed."""

import dataclasses
import json
import re
import signal
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from deploy.commands.tune import (
    Deadline,
    Trial,
    Tuned,
    format_found,
    read_duration,
    read_values,
    set_values,
    stop_on_interrupt,
    suggest,
    tune,
)
from deploy.config.config import Config, read_config
from deploy.exits import CommandError
from online_meta.types import Batch, Task
from streams.history.history import History
from tests.deploy.conftest import Cli
from tests.support.daemon import sinusoid_config
from tests.support.runs import fill
from trainers.learner_settings import lead_settings

ROUNDS, TRIAL = 104, 1e6
SECTIONS = """
[inner]
steps = 1
lr = 1e-3
[meta]
gradient = "first_order"
batch = 1
lr = 1e-3
[checkpoint]
every_rounds = 100
"""
KEYS = ["inner.lr", "inner.steps"]


def make_line(seed: int) -> Task:
    """Return a task of points on a line through 0 with a slope of its own."""
    random = torch.Generator().manual_seed(seed)
    x, slope = 3 * torch.randn(2, 8, 1, generator=random), torch.randn((), generator=random)
    return Task(*(Batch(part, slope * part) for part in x))


@pytest.fixture(scope="module")
def slow_config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration whose inner loop hardly moves, and the history of its run."""
    folder = tmp_path_factory.mktemp("tuned")
    linear = re.sub(r"hidden = \[.*?\]", "hidden = []", sinusoid_config(folder / "run", 0, sections=SECTIONS))
    (folder / "config.toml").write_text(linear)
    with History.open(folder / "run/history", write=True) as history:
        fill(history, [make_line(t) for t in range(ROUNDS)])
    return folder / "config.toml"


def history_of(config: Path) -> Path:
    return config.parent / "run/history"


class TrialClock:
    """A clock on which each trial takes ``TRIAL`` seconds, and which stays just before the end of trial ``end``."""

    def __init__(self, out: Path, end: int, at_trial: Callable[[int], None] = lambda count: None) -> None:
        self.out, self.end, self.at_trial = out, end, at_trial

    def __call__(self) -> float:
        file = self.out / "trials.jsonl"
        count = sum("values" in json.loads(line) for line in file.read_text().splitlines()) if file.exists() else 0
        self.at_trial(count)
        return min(count * TRIAL, self.end * TRIAL - 1e-3)


@pytest.fixture(scope="module", autouse=True)
def _without_checks_of_the_model() -> Iterator[None]:
    """Do not check the model each time, and let more rounds decide, so that short histories are enough."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("deploy.commands.tune.check_learning", lambda config: None)
        patch.setattr("deploy.commands.tune.HELD_OUT", 0.5)
        yield


def run_tune(config: Path, out: Path, trials: int, settings: Config | None = None) -> Tuned:
    stop = Deadline(0, TrialClock(out, trials))
    stop.at = trials * TRIAL
    return tune(settings or read_config(config), history_of(config), out, KEYS, stop)


@pytest.fixture(scope="module")
def found(slow_config: Path, tmp_path_factory: pytest.TempPathFactory) -> Tuned:
    """What five trials find."""
    return run_tune(slow_config, tmp_path_factory.mktemp("five"), 6)


def test_better_settings_are_found_and_decided_by_rounds_that_the_search_did_not_see(
    slow_config: Path, found: Tuned
) -> None:
    assert found.is_better
    assert (found.searched, found.compared, found.rounds) == (52, 52, 52)
    assert found.means is not None
    assert found.interval is not None
    low, high = found.interval
    assert low < found.means[1] - found.means[0] < high < 0
    text = format_found(found, read_config(slow_config))
    printed = tomllib.loads(text)
    assert printed == {"inner": {"lr": found.values["inner.lr"], "steps": found.values["inner.steps"]}}
    assert "On 52 later rounds, which the search did not see: mean loss" in text
    played = [len(one.means) for one in found.trials]
    assert played[0] == 2, "the current settings play every prefix"
    assert 1 in played, "a bad trial ends after the shortest prefix"


def test_a_search_in_two_parts_tries_the_same(slow_config: Path, found: Tuned, tmp_path: Path) -> None:
    first = run_tune(slow_config, tmp_path, 3)
    assert len(first.trials) < len(found.trials)
    assert run_tune(slow_config, tmp_path, 6) == found


def test_ctrl_c_prints_the_best_so_far(slow_config: Path, tmp_path: Path) -> None:
    def interrupt(count: int) -> None:
        if count == 3 and not stop.is_set_by_hand:
            stop.is_set_by_hand = True
            signal.raise_signal(signal.SIGINT)

    class Stop(Deadline):
        is_set_by_hand = False

    stop = Stop(0, lambda: 0.0)
    stop.clock, stop.at = TrialClock(tmp_path, 9, interrupt), 9 * TRIAL
    config = read_config(slow_config)
    before = signal.getsignal(signal.SIGINT)
    with stop_on_interrupt(stop):
        found = tune(config, history_of(slow_config), tmp_path, KEYS, stop)
    assert signal.getsignal(signal.SIGINT) is before
    assert found.interrupted
    assert len(found.trials) == 3
    text = format_found(found, config)
    assert "2 trials on 52 rounds, ended by Ctrl-C." in text
    assert "The best so far, by its mean loss over the first " in text
    assert tomllib.loads(text)["inner"]["lr"] == found.best.values["inner.lr"] != 1e-3


def test_the_command_prints_toml_with_the_values_to_use(cli: Cli, slow_config: Path, tmp_path: Path) -> None:
    ended = cli("tune", slow_config, "--budget", "1s", "--out", tmp_path, "--keys", "inner.lr, meta.lr")
    assert ended.code == 0
    printed = tomllib.loads(ended.out)
    assert printed["inner"].keys() == printed["meta"].keys() == {"lr"}
    ended = cli("tune", slow_config, "--budget", "1s", "--out", tmp_path, "--keys", "inner.lr,meta.lr", "--json")
    assert json.loads(ended.out)["current"] == {"inner.lr": 1e-3, "meta.lr": 1e-3}


CURRENT = Trial(0, {"meta.lr": 0.001}, {90: 2.0})
BETTER, WORSE = Trial(1, {"meta.lr": 0.01}, {90: 1.0}), Trial(1, {"meta.lr": 0.1}, {90: 3.0})


@pytest.mark.parametrize(
    ("found", "value", "says"),
    [
        (Tuned([CURRENT], None, 0, 90), 0.001, "Nothing that was tried beats"),
        (Tuned([CURRENT, WORSE], WORSE, 90, 90), 0.001, "Nothing that was tried beats"),
        (Tuned([CURRENT, BETTER], BETTER, 90, 90), 0.01, "No later rounds have decided yet"),
        (Tuned([CURRENT, BETTER], BETTER, 90, 90, 30, (2.0, 1.9)), 0.001, "with fewer than 50 rounds"),
        (
            Tuned([CURRENT, BETTER], BETTER, 90, 90, 60, (2.0, 1.9), (-0.4, 0.2)),
            0.001,
            "Nothing that was tried is shown",
        ),
        (Tuned([CURRENT, BETTER], BETTER, 90, 90, 60, (2.0, 1.5), (-0.8, -0.2)), 0.01, "between -0.8 and -0.2"),
    ],
)
def test_only_values_that_are_better_replace_the_current_ones(
    slow_config: Path, found: Tuned, value: float, says: str
) -> None:
    text = format_found(found, read_config(slow_config))
    assert tomllib.loads(text) == {"meta": {"lr": value}}
    assert says in text


@pytest.mark.parametrize("library", ["optuna", "random"])
def test_what_is_tried_next_is_a_function_of_the_seed_and_the_trials(
    library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if library == "random":
        monkeypatch.setitem(sys.modules, "optuna", None)
    space = {"meta.lr": (1e-4, 1.0, False), "inner.steps": (1, 20, True)}
    trials = [Trial(0, {"meta.lr": 0.01, "inner.steps": 5}, {30: 1.0})]
    for number in range(1, 16):
        values = suggest(trials, space, 7)
        assert values == suggest(trials, space, 7)
        assert 1e-4 <= values["meta.lr"] <= 1
        assert isinstance(values["inner.steps"], int)
        assert 1 <= values["inner.steps"] <= 20
        trials.append(Trial(number, values, {30: 1.0 + number}, "behind" if number % 2 else None))
    assert len({one.values["meta.lr"] for one in trials}) == 16
    assert suggest(trials, space, 8) != suggest(trials, space, 7)


def test_settings_of_the_leaders_own_table_are_tuned_there(slow_config: Path, tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    config.write_text(slow_config.read_text() + '[[learner]]\nkind = "ftml"\ninner = { lr = 1e-5 }\n')
    settings = read_config(config)
    values = read_values(settings, KEYS)
    assert values == {"inner.lr": 1e-5, "inner.steps": 1}
    changed = lead_settings(set_values(settings, {"inner.lr": 0.5, "inner.steps": 3}))
    assert (changed.inner.lr, changed.inner.steps) == (0.5, 3)
    assert "'ftml' has values of its own" in format_found(Tuned([Trial(0, values)], None, 0, 90), settings)


def test_what_cannot_be_tuned_is_refused(cli: Cli, slow_config: Path, found: Tuned, tmp_path: Path) -> None:
    ask = ("tune", slow_config, "--budget", "1s", "--out", tmp_path)
    ended = cli(*ask, "--keys", "inner.rule")
    assert (ended.code, "--keys inner.rule: only numbers can be tuned" in ended.err) == (78, True)
    ended = cli("tune", slow_config, "--budget", "soon")
    assert (ended.code, "'soon' is no duration: write a number and s, m or h" in ended.err) == (64, True)
    with History.open(tmp_path / "short/history", write=True) as history:
        fill(history, [make_line(t) for t in range(20)])
    ended = cli(*ask, "--history", tmp_path / "short/history")
    assert (ended.code, "has 20 rounds: tuning needs 40 or more" in ended.err) == (75, True)
    settings = read_config(slow_config)
    run_tune(slow_config, tmp_path, 1)
    other = dataclasses.replace(settings, run=dataclasses.replace(settings.run, seed=1))
    with pytest.raises(CommandError, match="trials of other settings or keys: name another folder by --out"):
        run_tune(slow_config, tmp_path, 1, other)


def test_durations() -> None:
    assert [read_duration(text) for text in ("90s", "10m", "1.5h")] == [90, 600, 5400]
