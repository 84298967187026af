"""Every algorithm, replay policy and baseline in the documentation is a working configuration."""

import re

import pytest

from deploy.checks.preflight import check_learning
from deploy.config.config import read_config
from tests.docs.pages import read_page
from tests.house.sources import ROOT

PAGES = ("how-to/algorithms.md", "concepts/replay.md")
TABLE = "".join(read_page(page) for page in PAGES)
ROWS = {
    cells[0]: re.findall(r"`([^`]+)`", cells[2])
    for cells in re.findall(r"(?m)^\| (.+?) \| (.*?) ?\| (`.+`) \|$", TABLE)
}


OF_CLASSES = {
    "MetaOptNet with logistic regression",
    "prototypical networks",
    "logistic regression on the inputs",
    "logistic regression of all rounds",
    "a good embedding",
}
CLASSES = ("task.y=class", "task.ways=3", "task.y_shape=[]", "model.loss=cross_entropy", "model.args.outputs=3")
"""What answers classes alone is tried on tasks of classes."""


def test_the_table_is_parsed():
    assert len(ROWS) == 60
    assert ROWS["FOMAML"] == ["meta.gradient=first_order"]


def test_the_readme_counts_the_algorithms():
    meta_learners, found, _ = read_page("how-to/algorithms.md").partition("## Baselines")
    rows = re.findall(r"(?m)^\| .+? \| .*? ?\| `.+` \|$", meta_learners)
    assert found
    assert f"{len(rows)} algorithms" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_example_of_a_neural_statistician_passes_the_check(tmp_path):
    config = read_config(ROOT / "deploy" / "number_sets.toml", (f"run.path={tmp_path}",))
    assert [source.kind for source in config.source] == ["number_sets"]
    check_learning(config)


@pytest.mark.parametrize("name", ROWS)
def test_an_algorithm_of_the_table_passes_the_check(name, tmp_path):
    tasks = CLASSES if name in OF_CLASSES else ()
    config = read_config(ROOT / "deploy" / "sinusoid.toml", (*tasks, *ROWS[name], f"run.path={tmp_path}"))
    check_learning(config)  # raises what is wrong with it
