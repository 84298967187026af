"""The generated reference pages agree with the code."""

from pathlib import Path

import pytest

from tests.docs import reference
from tests.docs.pages import read_page

PAGES = list(reference.PAGES)


@pytest.mark.parametrize("name", PAGES)
def test_the_committed_page_is_not_stale(name: str) -> None:
    assert read_page(f"reference/{name}") == reference.PAGES[name](), "the page is stale: run make reference"


@pytest.mark.parametrize("name", PAGES)
def test_a_page_without_one_of_its_rows_is_stale(tmp_path: Path, name: str) -> None:
    reference.write_stale(tmp_path)
    assert reference.list_stale(tmp_path) == []
    lines = (tmp_path / name).read_text(encoding="utf-8").splitlines(keepends=True)
    row = next(k for k, line in enumerate(lines) if line.startswith("| ") and "`" in line)
    (tmp_path / name).write_text("".join([*lines[:row], *lines[row + 1 :]]), encoding="utf-8")
    assert reference.list_stale(tmp_path) == [name]
    assert reference.write_stale(tmp_path) == [name]
    assert reference.list_stale(tmp_path) == []


def test_a_missing_page_is_stale(tmp_path: Path) -> None:
    assert reference.list_stale(tmp_path) == PAGES


def test_the_check_names_the_stale_page_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(reference, "FOLDER", tmp_path)
    assert reference.main([]) == 0
    assert reference.main(["--check"]) == 0
    (tmp_path / PAGES[0]).write_text("# Another page\n", encoding="utf-8")
    capsys.readouterr()
    assert reference.main(["--check"]) == 1
    assert capsys.readouterr().err == f"docs/reference/{PAGES[0]} is stale: run make reference\n"
    assert (tmp_path / PAGES[0]).read_text(encoding="utf-8") == "# Another page\n"


def test_a_new_metric_makes_the_page_stale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reference.write_stale(tmp_path)
    module = reference.prometheus.MODULES[0]
    added = module.METRICS[0]._replace(name="online_meta_rain")
    monkeypatch.setattr(module, "METRICS", (*module.METRICS, added))
    assert reference.list_stale(tmp_path) == ["metrics.md"]
