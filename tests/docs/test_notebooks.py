"""The notebooks of the tutorials run in order and give what they show, their answers are right, and pages have them."""

import base64
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tests.docs.notebook_pages import render_notebook
from tests.docs.notebooks import NOTEBOOKS, Output, read_cells, read_output, run_cells
from tests.docs.pages import DOCS, ROOT, shape

PNG = b"\x89PNG"


def check_demand(printed: str) -> None:
    """The pool is ahead of the best that does not learn across stores, and near the truth for one store."""
    assert "\npays\n" in printed
    answers = re.findall(r"predicted (\S+), true (\S+)", printed)
    assert len(answers) == 2
    for predicted, truth in answers:
        assert float(predicted) == pytest.approx(float(truth), abs=0.4)


def check_routing(printed: str) -> None:
    """The pool tells sections apart far better than by chance, 0.2, and most messages find their queue."""
    found = re.search(r"pool +loss \S+, accuracy (\S+)", printed)
    assert found is not None
    assert float(found[1]) > 0.45
    queues = re.findall(r"(?m)^(refunds|delivery|accounts|defects|jobs) ", printed)
    assert len(queues) == 5
    assert sum(one == right for one, right in zip(queues, ORDER, strict=True)) >= 4


ORDER = ("refunds", "delivery", "accounts", "defects", "jobs")
CHECKS: dict[str, Callable[[str], None]] = {"per-store-demand": check_demand, "few-shot-text-routing": check_routing}


def assert_same_shape(shown: Sequence[Output], found: Sequence[Output]) -> None:
    """Compare what a notebook shows with what its cells gave: the lines without their numbers, and how many plots."""
    for cell, (one, other) in enumerate(zip(shown, found, strict=True), 1):
        lines, given = one.text.splitlines(), other.text.splitlines()
        assert len(lines) == len(given), f"cell {cell} gave:\n{other.text}"
        assert [shape(line) for line in lines][:1] == [shape(line) for line in given][:1], f"cell {cell}"
        assert len(one.plots) == len(other.plots), f"cell {cell}"


@pytest.mark.timeout(900)
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_as_written(path: Path, tmp_path: Path) -> None:
    found = run_cells(path, tmp_path)
    assert_same_shape([read_output(cell) for cell in read_cells(path)], found)
    CHECKS[path.stem]("\n".join(output.text for output in found))


def write_notebook(path: Path, *cells: str) -> Path:
    given = [{"cell_type": "code", "source": [cell], "outputs": [], "metadata": {}} for cell in cells]
    path.write_text(json.dumps({"cells": given}))
    return path


def test_an_error_in_a_cell_fails_and_names_the_cell(tmp_path: Path) -> None:
    path = write_notebook(tmp_path / "wrong.ipynb", "sold = 0", "print('so far')\nprice = 1 / sold")
    with pytest.raises(AssertionError) as error:
        run_cells(path, tmp_path)
    for part in ("so far", "code cell 2", "price = 1 / sold", "ZeroDivisionError"):
        assert part in str(error.value)


def test_cells_share_names_and_give_their_texts_and_plots(tmp_path: Path) -> None:
    plot = "import matplotlib.pyplot as plt\nplt.plot([1, 2])\nprint(name)"
    path = write_notebook(tmp_path / "right.ipynb", "name = 'a store'", plot)
    first, second = run_cells(path, tmp_path)
    assert first == Output("", [])
    assert second.text == "a store\n"
    assert [base64.b64decode(one)[:4] for one in second.plots] == [PNG]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_stored_with_its_outputs_and_is_on_the_pages(path: Path) -> None:
    outputs = [read_output(cell) for cell in read_cells(path)]
    plots = [plot for output in outputs for plot in output.plots]
    assert plots
    assert all(base64.b64decode(plot)[:4] == PNG for plot in plots)
    assert f"tutorials/{path.name}" in (DOCS / "index.md").read_text(encoding="utf-8")
    assert f"tutorials/{path.name}" in (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    page = render_notebook(path.read_text(encoding="utf-8"))
    assert page.startswith("# ")
    assert page.count("```python") == len(outputs)
    assert page.count("data:image/png;base64,") == len(plots)
