"""The example of the page on tables runs as written."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from deploy.config.config import read_config
from streams.entities import find_entity
from streams.formats import wire
from streams.sources import rows
from streams.types import Arrival
from tests.deploy.conftest import Cli
from tests.docs.pages import assert_shown, blocks_of, code_of, read_page

PAGE = read_page("how-to/tables.md")
BLOCKS = blocks_of(PAGE)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the current folder, with the files of the page, and what its program writes."""
    for block in BLOCKS:
        if block.title:
            (tmp_path / block.title).write_text(block.text)
    subprocess.run([sys.executable, "make_sales.py"], cwd=tmp_path, env={"PATH": os.defpath}, check=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_example_makes_tasks_of_stores(folder: Path) -> None:
    config = read_config(folder / "sales.toml")
    source = rows.create_source(config.source[0].settings, config.task, "rows", 0)
    assert source is not None
    found: list[Arrival] = []
    for arrival in source.read(None):
        if arrival is None:
            break
        found.append(arrival)
    assert {arrival.rejection for arrival in found} == {None}
    assert {find_entity(arrival.id) for arrival in found} == {f"Store {number}" for number in range(40)}
    tasks = [wire.decode(arrival.body, config.task, config.serve.limits) for arrival in found]
    assert len(tasks) == 40 * 4, "four windows of 14 days of each store; four days are left"
    assert max(len(task.support.y) for task in tasks) > 30, "the past of a store grows"


def test_check_shows_the_first_tasks_as_tables(folder: Path, cli: Cli) -> None:
    checked = cli("check", "sales.toml", "--set", "regret.baselines=[]")
    assert checked.code == 0, checked.err
    assert_shown(code_of(PAGE, "text")[0], checked.out)
    assert checked.out.count("\nfirst    rows..Store_20") == 3
