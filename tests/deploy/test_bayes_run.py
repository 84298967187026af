"""A run with the comparator ``bayes`` writes its regret: nats above the exact Bayes predictor of its source."""

import hashlib
import json
from pathlib import Path

import pytest

from deploy.checks.preflight import check_learning
from deploy.config.config import read_config, read_settings, write_settings
from deploy.exits import ConfigError
from streams.formats import wire
from streams.history.history import History
from streams.sources import linear_gaussian
from streams.types import Record
from tests.deploy.conftest import Cli
from tests.house.sources import ROOT
from tests.support.daemon import sinusoid_config
from tests.support.finished import lines
from trainers.comparators.bayes import find_bayes_loss

NOISE = 0.4
SECTIONS = """
[regret]
comparator = ["bayes"]
baselines = []
"""
SOURCE = f"""
[[source]]
kind = "linear_gaussian"
noise = {NOISE}
"""
ROUNDS = 6
EXAMPLES = ("ambiguous_functions", "gp_regression", "linear_gaussian")


def write_config(folder: Path, more: str = SOURCE, loss: str = "gaussian_of_noise") -> Path:
    path = folder / "config.toml"
    path.write_text(sinusoid_config(folder / "run", 0, sections=SECTIONS).replace('"mse"', f'"{loss}"') + more)
    return path


def test_a_run_writes_its_regret_against_the_exact_bayes_predictor(cli: Cli, tmp_path: Path) -> None:
    settings = linear_gaussian.Settings(noise=NOISE)
    tasks = [linear_gaussian.make_task(settings, 0, t) for t in range(ROUNDS)]
    bodies = [wire.encode(task) for task in tasks]
    with History.open(tmp_path / "run/history", write=True) as history:
        history.append(
            [Record(f"t{t}", body, hashlib.sha256(body).digest(), "s", None, 0.0) for t, body in enumerate(bodies)]
        )
    ended = cli("replay", write_config(tmp_path), "--out", tmp_path / "out", "--json")
    assert ended.code == 0, ended.err
    found = json.loads(ended.out)["regret"]["bayes"]
    lost = sum(line["loss_after"] for line in lines(tmp_path / "out/rounds.jsonl"))
    best = sum(find_bayes_loss(linear_gaussian.oracle(settings), task) for task in tasks)
    assert found["value"] == pytest.approx(lost - best, rel=1e-5)
    assert (found["kind"], found["exact"], found["lower_bound"], found["as_of_round"]) == (
        *("bayes", True, False),
        ROUNDS,
    )
    (line,) = lines(tmp_path / "out/comparators.jsonl")
    assert line["cumulative_loss"] == pytest.approx(best, rel=1e-12)
    assert "The comparator is exact: the exact Bayes predictor" in (tmp_path / "out/report.html").read_text()


def test_the_only_source_of_a_run_is_that_of_bayes(tmp_path: Path) -> None:
    config = read_config(write_config(tmp_path))
    found = config.regret.comparator_options["bayes"]
    assert (found["source"], found["options"]["noise"]) == ("linear_gaussian", NOISE)
    check_learning(config)
    write_settings(tmp_path / "settings.json", config)
    assert read_settings(tmp_path / "settings.json").regret.comparator_options == {"bayes": found}
    named = '[regret.comparator_options.bayes]\nsource = "gp_regression"\noptions = { noise = 0.2 }\n'
    config = read_config(write_config(tmp_path, named))
    assert config.regret.comparator_options["bayes"] == {"source": "gp_regression", "options": {"noise": 0.2}}
    check_learning(config)


@pytest.mark.parametrize(
    ("more", "loss", "message"),
    [
        (SOURCE, "mse", r"\[regret\] comparator = 'bayes': the loss of an exact Bayes predictor is .* in nats"),
        ("", "gaussian_of_noise", "'http' in .* has no exact answers; those that have them are ambiguous"),
        (SOURCE + SOURCE + 'name = "b"\n', "gaussian_of_noise", "the run has several sources or none, .* set source"),
    ],
)
def test_a_run_without_an_exact_answer_is_refused(more: str, loss: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        check_learning(read_config(write_config(tmp_path, more, loss)))


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_of_a_source_with_exact_answers_passes_the_check(name: str, tmp_path: Path) -> None:
    config = read_config(ROOT / "deploy" / f"{name}.toml", (f"run.path={tmp_path}",))
    assert config.regret.comparator == ("bayes",)
    assert [source.kind for source in config.source] == [name]
    check_learning(config)
