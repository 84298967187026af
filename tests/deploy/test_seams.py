"""Names and options at every seam: registry files, import paths and entry points are checked at reading."""

import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest

import online_meta.rules
from deploy.checks.preflight import check_learning
from deploy.config.config import make_config, read_config, read_settings, write_settings
from deploy.exits import ConfigError
from online_meta import registry
from online_meta.learners import MemoryReplayBuffer
from trainers.build import build_context, build_learners
from trainers.seams import SEAMS, list_choices, list_options

RUN = {
    "run": {"path": "x"},
    "task": {"x_shape": [1], "y": "real", "y_shape": [1]},
    "model": {"build": "trainers.models:mlp", "args": {"inputs": 1, "outputs": 1, "hidden": [4]}, "loss": "mse"},
}
WRONG_OPTIONS = {
    "inner.options.lr_decay": {"inner": {"rule": "adam", "options": {"lr_decay": 1.0}}},
    "inner.options.beta": {"inner": {"rule": "momentum", "options": {"beta": "x"}}},
    "meta.options.rematerialise": {"meta": {"options": {"rematerialise": "yes"}}},
    "meta.schedule_options.warmup": {"meta": {"schedule_options": {"warmup": "long"}}},
    "meta.schedule_options.rounds": {"meta": {"schedule": "cosine"}},
    "meta.replay_options.size": {"meta": {"replay": "reservoir", "replay_options": {"size": 1.5}}},
    "regret.options.moml.alpha": {"regret": {"baselines": ["moml"], "options": {"moml": {"alpha": "x"}}}},
    "regret.options.ftml.alpha": {"regret": {"options": {"ftml": {"alpha": 1.0}}}},
    "regret.comparator_options.hindsight.steps": {"regret": {"comparator_options": {"hindsight": {"steps": 1}}}},
}
WRONG_NAMES = {
    "[inner] rule = 'sdg': did you mean 'sgd'": {"inner": {"rule": "sdg"}},
    "[meta] gradient = 'exakt': did you mean 'exact'": {"meta": {"gradient": "exakt"}},
    "[meta] schedule = 'cosin': did you mean 'cosine'": {"meta": {"schedule": "cosin"}},
    "[meta] replay = 'unifrom': did you mean 'uniform'": {"meta": {"replay": "unifrom"}},
    "[engine] kind = 'locale': did you mean 'local'": {"engine": {"kind": "locale"}},
    "[regret] baselines = 'momml': did you mean 'moml'": {"regret": {"baselines": ["momml"]}},
    "[regret] comparator = 'dynamik': did you mean 'dynamic'": {"regret": {"comparator": ["dynamik"]}},
    "[regret] options = 'momml': did you mean 'moml'": {"regret": {"options": {"momml": {}}}},
    "[inner] rule = 'nowhere:rule': 'nowhere:rule' cannot be imported": {"inner": {"rule": "nowhere:rule"}},
}
MODULE = """
from dataclasses import dataclass

import torch

from online_meta.learners import ftml
from online_meta.metagrads import exact
from online_meta.regret.ledger import Comparator
from online_meta.replay import uniform
from online_meta.rules import sgd
from online_meta.schedules.constant import constant
from streams.sources import sinusoid
from trainers import models
from trainers.comparators import RefreshResult
from trainers.engines import local

EXACT = True
STANDS_FOR = "nothing at all"


def network(width: int):
    return models.mlp(1, 1, (width,))


def halved(lr: float, factor: float = 0.5):
    return sgd(lr=lr * factor)


def estimator(inner):
    return exact.exact(inner)


def flat():
    return constant()


def policy():
    return uniform.uniform()


def engine(settings, meta, rank_stats=None):
    return local.build(settings, meta, rank_stats)


def baseline(context, scale: float = 1.0):
    return ftml.build(context)


def zero(context, regret, request, saved, should_continue, *, loss: float = 0.0):
    return RefreshResult(Comparator("zero", request.rounds, loss, 0.0), {"loss": torch.tensor(loss)})


@dataclass(frozen=True)
class Waves:
    tasks: int = 3


def waves(settings: Waves, spec, name: str, seed: int):
    return sinusoid.create_source(sinusoid.Settings(tasks=settings.tasks), spec, name, seed)
"""
CONFIG = """
[run]
path = "{folder}/run"

[task]
x_shape = [1]
y = "real"
y_shape = [1]

[model]
build = "{module}:network"
args = {{ width = 4 }}
loss = "mse"

[inner]
rule = "{module}:halved"
options = {{ factor = 0.25 }}

[meta]
gradient = "{module}:estimator"
schedule = "{module}:flat"
replay = "{module}:policy"

[engine]
kind = "{module}:engine"

[regret]
baselines = ["{module}:baseline"]
comparator = ["{module}:zero"]
options = {{ "{module}:baseline" = {{ scale = 2.0 }} }}
comparator_options = {{ "{module}:zero" = {{ loss = 1.5 }} }}

[[source]]
kind = "{module}:waves"
tasks = 2
"""


@pytest.fixture
def module(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[str]:
    """A user module next to the configuration that names it."""
    name = f"mine_{abs(hash(request.node.name))}"
    (tmp_path / f"{name}.py").write_text(MODULE)
    (tmp_path / "config.toml").write_text(CONFIG.format(folder=tmp_path, module=name))
    path = [*sys.path]
    yield name
    sys.path[:] = path
    sys.modules.pop(name, None)


@pytest.mark.parametrize("place", WRONG_OPTIONS)
def test_options_are_checked_by_name_and_type_when_a_configuration_is_read(place: str) -> None:
    section, _, key = place.rpartition(".")
    with pytest.raises(ConfigError) as caught:
        make_config(RUN | WRONG_OPTIONS[place], "here.toml")
    assert f"here.toml: [{section}] " in str(caught.value)
    assert key in str(caught.value).removeprefix(f"here.toml: [{section}] ")


@pytest.mark.parametrize("message", WRONG_NAMES)
def test_names_are_checked_when_a_configuration_is_read(message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_config(RUN | WRONG_NAMES[message], "here.toml")
    assert f"here.toml: {message}" in str(caught.value)


def test_every_seam_is_a_key_of_its_section_and_every_option_has_a_type() -> None:
    config = make_config(RUN, "here.toml")
    for seam in SEAMS:
        keys = [field.name for field in fields(getattr(config, seam.section))]
        assert seam.key in keys
        assert not seam.options or seam.options in keys
        for name in registry.names(seam.package):
            for option, parameter in list_options(seam, name).items():
                assert parameter.annotation is not parameter.empty, f"{seam.section}.{seam.key}.{name}.{option}"


def test_every_name_can_be_an_import_path_next_to_the_configuration(module: str, tmp_path: Path) -> None:
    config = read_config(tmp_path / "config.toml")
    (tmp_path / "run").mkdir()
    write_settings(tmp_path / "run" / "settings.json", config)
    settings = read_settings(tmp_path / "run" / "settings.json")
    assert settings == config.trainer()
    context = build_context(settings, MemoryReplayBuffer(), engine=settings.engine.kind)
    assert {tuple(weight.shape) for weight in context.start.weights.values()} == {(4, 1), (4,), (1, 4), (1,)}
    assert [*build_learners(settings, context)] == ["ftml", f"{module}:baseline", "pool"]
    (source,) = config.source
    assert (source.name, source.settings.tasks) == ("waves", 2)
    check_learning(config)


def test_a_module_next_to_the_configuration_is_found_only_through_it(module: str) -> None:
    with pytest.raises(ConfigError, match=f"'{module}:halved' cannot be imported"):
        make_config(RUN | {"inner": {"rule": f"{module}:halved"}}, "here.toml")


def test_options_of_an_import_path_are_checked_too(module: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"\[inner.options\] has no key 'faktor': did you mean 'factor'"):
        read_config(tmp_path / "config.toml", ("inner.options={faktor=1.0}",))
    with pytest.raises(ConfigError, match=r"has no key 'lost': did you mean 'loss'"):
        read_config(tmp_path / "config.toml", (f'regret.comparator_options={{"{module}:zero"={{lost=1.0}}}}',))
    file = tmp_path / "config.toml"
    file.write_text(file.read_text().replace("tasks = 2", "task = 2"))
    with pytest.raises(ConfigError, match=r"\[source 1\] has no key 'task': did you mean 'tasks'"):
        read_config(file)


def test_another_package_adds_entries_through_entry_points(module: str, tmp_path: Path) -> None:
    installed = tmp_path / f"{module}-1.0.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
    groups = {"rules": "halved", "learners": "baseline", "comparators": "zero", "sources": "waves", "replay": "policy"}
    lines = [f"[online_meta.{group}]\nplugged = {module}:{name}\n" for group, name in groups.items()]
    (installed / "entry_points.txt").write_text("\n".join(lines))
    sys.path.append(str(tmp_path))
    registry._entry_points.cache_clear()
    try:
        assert "plugged" in registry.names(online_meta.rules)
        assert online_meta.rules.plugged.__name__ == "halved"
        chosen = {
            "inner": {"rule": "plugged", "options": {"factor": 0.25}},
            "meta": {"replay": "plugged"},
            "regret": {"baselines": ["plugged"], "comparator": ["plugged"]},
            "source": [{"kind": "plugged", "tasks": 1}],
        }
        config = make_config(RUN | chosen, "here.toml")
        assert {choice.name for seam in SEAMS for choice in list_choices(seam, getattr(config, seam.section))} == {
            *("plugged", "point", "exact", "constant", "local")
        }
        check_learning(config)
        with pytest.raises(ConfigError, match=r"\[inner.options\] has no key 'faktor'"):
            make_config(RUN | {"inner": {"rule": "plugged", "options": {"faktor": 0.25}}}, "here.toml")
    finally:
        registry._entry_points.cache_clear()


@pytest.mark.parametrize("place", ["rule", "kind"])
def test_a_module_that_fails_at_import_is_a_configuration_error(place: str, module: str, tmp_path: Path) -> None:
    broken = f"broken_{module}"
    (tmp_path / f"{broken}.py").write_text("raise RuntimeError('no licence')\n")
    file = tmp_path / "config.toml"
    name = {"rule": "halved", "kind": "waves"}[place]
    file.write_text(file.read_text().replace(f"{module}:{name}", f"{broken}:{name}"))
    with pytest.raises(ConfigError, match=f"{place} = '{broken}:{name}': RuntimeError: no licence"):
        read_config(file)


def test_a_source_whose_settings_have_no_type_is_explained(module: str, tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text(file.read_text().replace(f"{module}:waves", f"{module}:network"))
    with pytest.raises(ConfigError, match=r"\[source 1\] kind = .* needs a parameter `settings`"):
        read_config(file)
