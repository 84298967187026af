"""The commands that make the tables of docs/results."""

import re
from importlib.util import find_spec

from tests.house.sources import ROOT


def test_make_experiments_runs_existing_modules():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8").replace("\\\n", " ")
    (tables,) = re.findall(r"^TABLE \?= (.*)$", makefile, re.MULTILINE)
    assert len(tables.split()) >= 10
    for table in tables.split():
        assert find_spec(f"tests.experiments.{table}"), table


def test_the_commands_on_the_pages_run_existing_modules():
    pages = (ROOT / "docs/results").glob("*.md")
    commands = [re.search(r"^`python -m ([\w.]+)", page.read_text(encoding="utf-8"), re.MULTILINE) for page in pages]
    modules = [command[1] for command in commands if command]
    assert len(modules) >= 15
    for module in modules:
        assert find_spec(module), module
