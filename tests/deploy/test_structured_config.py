"""Named inputs and targets in the configuration: what is read, and what is said about a mistake."""

from pathlib import Path

import jsonschema
import pytest

from deploy.checks.preflight import check_learning
from deploy.config.config import Config, read_config
from deploy.config.describe import make_schema
from deploy.exits import ConfigError
from streams.spec import InputSpec, TargetSpec

NAMED = '[task.x.tokens]\nshape = [16]\ndtype = "int64"\n[task.x.mask]\nshape = [16]\n'
TARGETS = '[task.targets.box]\nkind = "real"\nshape = [4]\n[task.targets.object]\nways = 3\n'
MISTAKES = {
    "a key that no input has": (NAMED + "size = 3\n", "[task.x.mask] has no key 'size': known: dtype, shape"),
    "no table": ("[task.x]\ntokens = 3\n", "task.x.tokens = 3: it must be a table, [task.x.tokens]"),
    "no tables": ("x = 3\n", "task.x = 3: it must be tables, [task.x.NAME]"),
    "no shape": ('[task.x.tokens]\ndtype = "int64"\n', "[task.x.tokens] shape is missing"),
    "a wrong size": ("[task.x.tokens]\nshape = [-2]\n", "[task.x.tokens] shape[0] = -2: must be at least -1"),
    "an unknown dtype": ('[task.x.m]\nshape = []\ndtype = "bool"\n', "[task.x.m] dtype = 'bool': must be 'uint8'"),
    "a dot in a name": ('[task.x."a.b"]\nshape = []\n', "[task] x has the name 'a.b'; it must be letters, digits"),
    "one tensor, too": ("x_shape = [1]\n" + NAMED, "[task] x names the inputs mask, tokens: leave out x_shape"),
    "nothing": ("", "[task] x_shape is missing, for example x_shape = [3, 28, 28], or a table [task.x.NAME]"),
    "a kind of target": (NAMED + '[task.targets.a]\nkind = "reel"\n', "[task.targets.a] kind = 'reel': must be"),
    "no classes": (NAMED + "[task.targets.a]\n", "[task.targets.a] ways is None; kind = 'class' needs the number"),
}


def write(folder: Path, task: str, y: str = 'y = "real"\n') -> Path:
    file = folder / "config.toml"
    file.write_text(f'[task]\n{y}{task}[run]\npath = "{folder}/run"\n[model]\nbuild = "mine:net"\n')
    return file


def test_named_inputs_are_read(tmp_path: Path) -> None:
    task = read_config(write(tmp_path, NAMED)).task
    assert task.inputs() == {"mask": InputSpec((16,)), "tokens": InputSpec((16,), "int64")}
    assert task.list_targets() == {"": TargetSpec("real")}


def test_named_targets_are_read(tmp_path: Path) -> None:
    task = read_config(write(tmp_path, "x_shape = [2]\n" + TARGETS, y="")).task
    assert task.list_targets() == {"box": TargetSpec("real", shape=(4,)), "object": TargetSpec("class", 3)}
    assert task.inputs() == {"": InputSpec((2,))}


@pytest.mark.parametrize(
    ("loss", "task", "values"),
    [
        ("poisson", "y_shape = [2]", "counts"),
        ("poisson", "y_shape = []", "counts"),
        ("categorical", "y_shape = [2]", "probabilities"),
        ("cross_entropy", "y_shape = [2]", "probabilities"),
        ("cross_entropy", 'y_shape = [2]\ny_values = "numbers"', "numbers"),
        ("mse", 'y_shape = [2]\ny_values = "counts"', "counts"),
        ("mse", "y_shape = [2]", "numbers"),
        ("bernoulli", "y_shape = [2]", "numbers"),
    ],
)
def test_what_real_targets_must_be_follows_from_the_loss(tmp_path: Path, loss: str, task: str, values: str) -> None:
    file = write(tmp_path, f"x_shape = [2]\n{task}\n")
    file.write_text(file.read_text() + f'loss = "{loss}"\n')
    assert read_config(file).task.list_targets()[""].values == values


@pytest.mark.parametrize(
    ("task", "y", "message"),
    [
        ('ways = 3\ny_values = "counts"\n', "", "y_values is 'counts', which real targets may be"),
        ('y_values = "probabilities"\n', 'y = "real"\n', "y_values is 'probabilities', but a target is one number"),
        ('y_values = "odds"\n', 'y = "real"\n', "y_values = 'odds': must be 'numbers', 'counts' or 'probabilities'"),
    ],
)
def test_a_wrong_kind_of_values_says_what_is_right(tmp_path: Path, task: str, y: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        read_config(write(tmp_path, "x_shape = [2]\n" + task, y))
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("task", "learners"),
    [
        (NAMED, {"from_scratch", "constant"}),
        (
            NAMED.replace("int64", "uint8"),
            {"from_scratch", "constant", "ridge_head", "pooled_ridge", "hierarchical_bayes"},
        ),
        (NAMED.replace("int64", "uint8").replace("[16]", "[-1]"), {"from_scratch", "constant", "ridge_head"}),
        ("x_shape = [2]\n" + TARGETS, {"from_scratch"}),
    ],
    ids=["tokens", "numbers", "numbers of any size", "named targets"],
)
def test_learners_in_closed_form_play_by_default_where_they_can_answer(
    tmp_path: Path, task: str, learners: set[str]
) -> None:
    config = write(tmp_path, task, y="" if "targets" in task else 'y = "real"\n')
    config.write_text(config.read_text() + 'loss = "mse"\n')
    assert {*read_config(config).regret.baselines} == learners


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_explained(tmp_path: Path, mistake: str) -> None:
    task, message = MISTAKES[mistake]
    with pytest.raises(ConfigError) as caught:
        read_config(write(tmp_path, task))
    assert message in str(caught.value)


def test_the_schema_knows_the_tables() -> None:
    validator = jsonschema.Draft202012Validator(make_schema(Config))
    whole = {"run": {"path": "a"}, "model": {"build": "mine:net"}}
    assert validator.is_valid({**whole, "task": {"x": {"tokens": {"shape": [16], "dtype": "int64"}}, "ways": 2}})
    assert validator.is_valid({**whole, "task": {"x_shape": [1], "targets": {"a": {"ways": 2}}}})
    assert not validator.is_valid({**whole, "task": {"x": {"tokens": {"shape": [16], "size": 3}}, "ways": 2}})
    assert not validator.is_valid({**whole, "task": {"x": {"tokens": {"dtype": "int64"}}, "ways": 2}})


def test_a_model_that_returns_an_object_needs_its_output(tmp_path: Path) -> None:
    file = write(tmp_path, "x_shape = [3]\ny_shape = [2]\n")
    text = file.read_text().replace("mine:net", "tests.numerics.test_model_outputs:classified") + 'loss = "mse"\n'
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"returns a Classified with .*logits .* such as output = 'logits'"):
        check_learning(read_config(file))
    file.write_text(text + 'output = "logits"\n')
    check_learning(read_config(file))
