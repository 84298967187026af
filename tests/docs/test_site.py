"""The documentation builds into a site, and a dead link fails the build."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import online_meta
from online_meta import aggregation, metagrads, registry, replay, schedules
from tests.docs.pages import DOCS, ROOT


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """Return a copy of what the site is built from."""
    folder = tmp_path / "sources"
    shutil.copytree(DOCS, folder / "docs")
    shutil.copy(ROOT / "mkdocs.yml", folder)
    for name in ("CHANGELOG.md", "CONTRIBUTING.md", "online_meta", "tests"):
        (folder / name).symlink_to(ROOT / name)
    return folder


def build(sources: Path, site: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)],
        cwd=sources,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_site_builds_without_a_warning_and_has_every_page_and_public_name(sources: Path, tmp_path: Path) -> None:
    done = build(sources, tmp_path / "site")
    assert done.returncode == 0, done.stderr
    for page in (*sources.glob("docs/**/*.md"), *sources.glob("docs/**/*.ipynb")):
        built = page.relative_to(sources / "docs").with_suffix(".html")
        built = built.with_name("index.html") if built.name == "README.html" else built
        assert (tmp_path / "site" / built).exists(), built
    notebook = (tmp_path / "site/tutorials/per-store-demand.html").read_text(encoding="utf-8")
    for shown in ('href="../how-to/tables.html"', "data:image/png;base64,", "rounds learned: 160", "<h2 id="):
        assert shown in notebook

    anchors = set(re.findall(r'id="([^"]+)"', (tmp_path / "site/reference/python.html").read_text(encoding="utf-8")))
    for name in set(online_meta.__all__) - {"posteriors", "rules"}:
        function = "online_meta.preflight.preflight.preflight"  # the package has the same name
        anchor = function if name == "preflight" else f"online_meta.{name}"
        assert anchor in anchors, f"docs/reference/python.md does not show online_meta.{name}"
    for package in (online_meta.rules, online_meta.posteriors, metagrads, replay, schedules):
        for name in registry.names(package):
            assert f"{package.__name__}.{name}.{name}" in anchors, f"docs/reference/python.md does not show {name}"
    for name in registry.names(aggregation):
        assert f"{aggregation.__name__}.{name}.build" in anchors, f"docs/reference/python.md does not show {name}"


@pytest.mark.parametrize(
    ("added", "warning"),
    [
        ("[dead](how-to/nowhere.md)", "nowhere.md"),
        ("[dead](how-to/serve.md#nothing-here)", "nothing-here"),
        ("::: online_meta.nothing_here", "nothing_here"),
        ("[dead][online_meta.nothing_here]", "nothing_here"),
    ],
)
def test_a_dead_link_or_an_unknown_name_fails_the_build(
    sources: Path, tmp_path: Path, added: str, warning: str
) -> None:
    with open(sources / "docs/index.md", "a", encoding="utf-8") as page:
        page.write(f"\n\n{added}\n")
    done = build(sources, tmp_path / "site")
    assert done.returncode == 1
    assert warning in done.stderr
