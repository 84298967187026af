"""Every row of docs/algorithms.md is a configuration that works."""

import re

import pytest

from deploy.checks.preflight import check_learning
from deploy.config.config import read_config
from tests.house.sources import ROOT

TABLE = (ROOT / "docs" / "algorithms.md").read_text(encoding="utf-8")
ROWS = {
    cells[0]: re.findall(r"`([^`]+)`", cells[2])
    for cells in re.findall(r"(?m)^\| (.+?) \| (.*?) ?\| (`.+`) \|$", TABLE)
}


def test_the_table_is_read():
    assert len(ROWS) == 36
    assert ROWS["FOMAML"] == ["meta.gradient=first_order"]


@pytest.mark.parametrize("name", ROWS)
def test_an_algorithm_of_the_table_passes_the_check(name, tmp_path):
    config = read_config(ROOT / "deploy" / "sinusoid.toml", (*ROWS[name], f"run.path={tmp_path}"))
    check_learning(config)  # raises what is wrong with it
