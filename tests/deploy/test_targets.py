"""Targets other than one class or one number for a sample: what `check` accepts and how it explains a mistake."""

from pathlib import Path

import pytest

from tests.deploy.conftest import Cli
from tests.support.daemon import free_port

MODEL = '[model]\nbuild = "tests.deploy.user_models:{}"\nloss = "{}"\n'
PIXELS = 'x_shape = [1, -1, 5]\ny = "class"\nways = 3\ny_shape = [-1, 5]\n'
TAGS = 'x_shape = [6]\nx_dtype = "int64"\ny = "class"\nways = 3\ny_shape = [6]\n'
NUMBERS = 'x_shape = [2]\ny = "real"\ny_shape = [3]\n'
GRADES = 'x_shape = [2]\ny = "class"\nways = {}\n'
TWO_INPUTS = "[task.x.image]\nshape = [3]\n[task.x.hint]\nshape = [2]\n"
TWO_TARGETS = '[task.targets.kind]\nways = 3\n[task.targets.box]\nkind = "real"\nshape = [4]\n'
TASKS = {
    "two inputs and two targets": (TWO_INPUTS + TWO_TARGETS, MODEL.format("Finder", "tests.deploy.user_models:found")),
    "tokens and a mask": (
        'ways = 3\n[task.x.tokens]\nshape = [-1]\ndtype = "int64"\n[task.x.mask]\nshape = [-1]\n',
        MODEL.format("Masked", "cross_entropy"),
    ),
    "segmentation": (PIXELS, MODEL.format("pixels", "cross_entropy")),
    "segmentation by rows": (PIXELS, MODEL.format("pixels", "categorical")),
    "tagging": (TAGS, MODEL.format("Tagger", "cross_entropy")),
    "several labels": (NUMBERS, MODEL.format("three", "bernoulli")),
    "soft labels": (NUMBERS, MODEL.format("three", "cross_entropy")),
    "counts": (NUMBERS, MODEL.format("three", "poisson")),
    "ordered classes": (GRADES.format(4), MODEL.format("three", "ordinal")),
}
MISTAKES = {
    "an input of another name": (
        TWO_INPUTS.replace("hint", "clue") + TWO_TARGETS,
        MODEL.format("Finder", "tests.deploy.user_models:found"),
        "the model's forward takes image, hint, and the task has the inputs clue, image: give the inputs the names",
    ),
    "an image of numbers": (
        PIXELS.replace("y_shape = [-1, 5]", ""),
        MODEL.format("pixels", "cross_entropy"),
        "gives an output of shape (4, 3, 32, 5) for 4 samples, which does not fit [task] y = 'class', ways = 3: ",
    ),
    "other pixels": (
        PIXELS.replace("y_shape = [-1, 5]", "y_shape = [-1, 4]"),
        MODEL.format("pixels", "cross_entropy"),
        "which does not fit [task] y = 'class', ways = 3, y_shape = (-1, 4): ",
    ),
    "too few ordered classes": (
        GRADES.format(5),
        MODEL.format("three", "ordinal"),
        "gives an output of shape (4, 3) for 4 samples; [task] ways = 5 needs (n, 4)",
    ),
    "soft labels of other classes": (
        NUMBERS.replace("[3]", "[2]"),
        MODEL.format("three", "cross_entropy"),
        "'cross_entropy' is for classes, but [task] y = 'real'",
    ),
}


def write(folder: Path, task: str, model: str) -> Path:
    path = folder / "config.toml"
    path.write_text(
        f'[run]\npath = "{folder}/run"\n[task]\n{task}{model}[inner]\nsteps = 1\n[regret]\n'
        f"comparator = []\n[serve]\nport = {free_port()}\n"
    )
    return path


@pytest.mark.parametrize("name", TASKS)
def test_check_accepts_targets(cli: Cli, tmp_path: Path, name: str) -> None:
    ended = cli("check", write(tmp_path, *TASKS[name]))
    assert (ended.code, ended.err) == (0, "")


@pytest.mark.parametrize("name", MISTAKES)
def test_check_explains(cli: Cli, tmp_path: Path, name: str) -> None:
    task, model, message = MISTAKES[name]
    ended = cli("check", write(tmp_path, task, model))
    assert ended.code == 78
    assert message in ended.err, ended.err
