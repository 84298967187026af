"""Settings that are "auto": what plays for them, what is refused, and what editors are offered."""

import json
from pathlib import Path

import pytest

from deploy.config.config import Config, read_config, read_settings, write_settings
from deploy.config.describe import make_schema
from deploy.exits import ConfigError
from tests.deploy.conftest import Cli
from trainers.learner_settings import list_learners, override_settings
from trainers.settings_fingerprint import check_same_settings, fingerprint, reproducibility_key

SECTIONS = """
[inner]
lr = "auto"
steps = "auto"
[meta]
lr = "auto"
batch = 3
"""


def read(config: Path, *overrides: str) -> Config:
    config.write_text(config.read_text().replace("[inner]\nsteps = 2\n[meta]\nbatch = 2\n", SECTIONS))
    return read_config(config, overrides)


def test_each_candidate_plays_as_a_learner_or_an_answer(config: Path) -> None:
    settings = read(
        config, "tuning.inner_lr=[0.02, 0.2]", "tuning.meta_lr=[0.003, 0.03, 1e-5]", "tuning.inner_steps=[3, 7]"
    )
    variants = ("ftml", "ftml.inner.lr=0.2", "ftml.meta.lr=0.03", "ftml.meta.lr=1e-05")
    assert settings.race == tuple(name + suffix for name in variants for suffix in ("", "@7"))
    assert [one.name for one in list_learners(settings)] == [*variants, "from_scratch"]
    played = [override_settings(settings, one) for one in list_learners(settings)]
    assert [one.inner.lr for one in played] == [0.02, 0.2, 0.02, 0.02, 0.02]
    assert [one.meta.lr for one in played] == [0.003, 0.003, 0.03, 1e-5, 0.003]
    assert {one.inner.steps for one in played} == {3}
    assert [one.inner.answer_steps for one in played[:4]] == [(0, 1, 2, 5, 7, 10, 20), *[(7,)] * 3]
    assert {one.meta.batch for one in played} == {3}


def test_a_race_of_learning_rates_alone_leaves_the_answers_of_the_leader(config: Path) -> None:
    settings = read(config, "inner.steps=4", "meta.lr=0.1")
    assert settings.race == ("ftml", "ftml.inner.lr=0.03", "ftml.inner.lr=0.1")
    steps = [override_settings(settings, one).inner.answer_steps for one in list_learners(settings)]
    assert steps[:3] == [settings.inner.answer_steps, (), ()]
    assert len(steps[0]) > 3


def test_a_race_of_steps_alone_needs_no_further_learner(config: Path) -> None:
    settings = read(config, "inner.lr=0.1", "meta.lr=0.1", "tuning.budget=0")
    assert settings.race == ("ftml", "ftml@1", "ftml@2", "ftml@10", "ftml@20")
    assert [one.name for one in list_learners(settings)] == ["ftml", "from_scratch"]


def test_without_auto_nothing_races_and_nothing_changes(config: Path) -> None:
    settings = read_config(config)
    tuned = read_config(config, ("tuning.budget=1", "tuning.alpha=0.5"))
    assert (settings.race, settings.learner) == ((), ())
    assert fingerprint(settings.trainer()) == fingerprint(tuned.trainer())
    check_same_settings(reproducibility_key(settings.trainer()), tuned.trainer())


def test_the_processes_of_a_run_read_the_same_race(config: Path, tmp_path: Path) -> None:
    settings = read(config)
    write_settings(tmp_path / "settings.json", settings)
    assert read_settings(tmp_path / "settings.json") == settings.trainer()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ("tuning.budget=3",),
            "[tuning] budget = 3: 4 further learning rates race, and each costs a meta-update a round",
        ),
        (("tuning.inner_lr=[0.1]",), "inner_lr = [0.1]: a race needs two or more candidates, each once"),
        (("tuning.meta_lr=[0.1, 0.1]",), "meta_lr = [0.1, 0.1]: a race needs two or more candidates, each once"),
        (("tuning.meta_lr=[0.1, -0.1]",), "[tuning] meta_lr[1] = -0.1: must be greater than 0"),
        (("tuning.meta_lr=high",), "[tuning] meta_lr[0] = 'high': must be a number"),
        (("tuning.alpha=1",), "[tuning] alpha = 1: must be less than 1"),
        (("meta.batch=auto",), "[meta] batch = 'auto': must be a whole number"),
        (("regret.options.ftml.lr=0.1",), "[meta] lr = 'auto': the options of 'ftml' say how it steps, not [meta]"),
    ],
)
def test_what_is_no_race_is_refused(config: Path, overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        read(config, *overrides)
    assert message in str(refused.value)


def test_auto_beside_the_leaders_own_value_is_refused(config: Path) -> None:
    config.write_text(config.read_text() + '[[learner]]\nkind = "ftml"\nname = "own"\nmeta = { lr = 0.1 }\n')
    with pytest.raises(ConfigError, match=r"\[meta\] lr = 'auto': the \[\[learner\]\] 'own' has a value of its own"):
        read(config)
    config.write_text(config.read_text().replace("meta = { lr = 0.1 }", 'inner = { lr = "auto" }'))
    with pytest.raises(ConfigError, match=r"inner.lr = 'auto': must be a number"):
        read(config)


def test_the_schema_offers_auto_for_the_settings_of_a_run_alone() -> None:
    schema = make_schema(Config)
    for section, key in (("InnerSettings", "lr"), ("InnerSettings", "steps"), ("MetaSettings", "lr")):
        assert {"const": "auto"} in schema["$defs"][section]["properties"][key]["anyOf"]
    assert "race" not in schema["properties"]
    (ftml,) = [
        one
        for one in schema["properties"]["learner"]["items"]["oneOf"]
        if one["properties"]["kind"] == {"const": "ftml"}
    ]
    assert "auto" not in json.dumps(ftml["properties"]["inner"]["properties"]["lr"].get("anyOf", ""))


def test_check_builds_every_candidate(cli: Cli, config: Path) -> None:
    read(config)
    ended = cli("check", config)
    assert (ended.code, ended.err) == (0, "")
