"""The pages of docs/results agree with the code that renders them and with the commands that make them."""

import json
import os
import re
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec

import pytest

from tests.house.sources import ROOT

RESULTS = ROOT / "docs/results"
RENDERERS = {
    "bench": "benchmarks.table",
    "bench_answers": "benchmarks.answers",
    "bench_distributed": "benchmarks.distributed",
    "bench_frozen": "benchmarks.frozen",
    "bench_memory": "benchmarks.memory",
    "bench_rounds": "benchmarks.rounds.page",
    "bench_streams": "benchmarks.streams.__main__",
    "cost": "experiments.round_cost.page",
    "filtered_glyphs": "experiments.filtered_glyphs.page",
    "first_table": "experiments.first_table",
    "glyph_table": "experiments.glyphs.page",
    "glyph_tuning": "experiments.glyphs.tuning",
    "large_models": "benchmarks.large_models",
    "moml_protocol": "experiments.moml.page",
    "neural_processes": "experiments.neural_processes",
    "non_stationary": "experiments.non_stationary.page",
    "package_texts": "experiments.package_texts",
    "pool": "experiments.pool.page",
    "pool_cost": "experiments.pool_cost",
    "rainbow_protocol": "experiments.rainbow.page",
    "regression_streams": "experiments.regression.page",
    "regret_theory": "experiments.regret_theory",
    "segmentation": "experiments.segmentation",
    "sinusoid_known_answers": "experiments.sinusoid_known_answers",
    "unsegmented": "experiments.unsegmented.page",
}
"""The module under ``tests`` whose ``render`` writes each page."""


def test_every_page_has_a_renderer():
    assert {page.stem for page in RESULTS.glob("*.md")} - {"README"} == RENDERERS.keys()


@pytest.mark.parametrize("name", RENDERERS)
def test_a_page_is_rendered_from_its_json(name):
    result = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    page = import_module(f"tests.{RENDERERS[name]}").render(result)
    assert (RESULTS / f"{name}.md").read_text(encoding="utf-8") == page


@pytest.mark.parametrize("name", RENDERERS)
def test_the_command_of_a_page_runs_an_existing_module(name):
    page = (RESULTS / f"{name}.md").read_text(encoding="utf-8")
    (module,) = re.findall(r"^`python -m ([\w.]+)", page, re.MULTILINE)
    assert find_spec(module)


def test_make_experiments_runs_existing_modules():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8").replace("\\\n", " ")
    (tables,) = re.findall(r"^TABLE \?= (.*)$", makefile, re.MULTILINE)
    assert len(tables.split()) >= 10
    for table in tables.split():
        assert find_spec(f"tests.experiments.{table}"), table


PROGRAM = """
from pathlib import Path
from tests.experiments.common.tables import run_rows

def double(number):
    return {"double": 2 * number}

if __name__ == "__main__":
    run_rows(2, double, [(3,), (4,)], lambda rows: Path("rows.txt").write_text(str(rows)))
"""


def test_a_package_that_is_run_as_a_program_has_its_rows_computed_in_other_processes(tmp_path):
    (tmp_path / "doubling").mkdir()
    (tmp_path / "doubling" / "__main__.py").write_text(PROGRAM)
    folders = os.pathsep.join((str(tmp_path), str(ROOT)))
    environment = {**os.environ, "PYTHONPATH": folders}
    subprocess.run([sys.executable, "-m", "doubling"], cwd=tmp_path, env=environment, check=True)
    assert (tmp_path / "rows.txt").read_text() == "[{'double': 6}, {'double': 8}]"
