"""The examples in the README and the guides that it links to work as printed."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.pages import DOCS, ROOT, blocks_of, code_of, read_page

README = (ROOT / "README.md").read_text(encoding="utf-8")
SERVE = read_page("how-to/serve.md")
CONFIG = next(block.text for block in blocks_of(SERVE) if block.title == "sines.toml")
CHAPTERS = [
    *code_of(read_page("how-to/running-for-months.md"), "toml"),
    *code_of(read_page("how-to/several-machines.md"), "toml"),
]
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )


def with_sections(config: str, further: str) -> str:
    """Replace the sections that both texts have by those of the later chapter, and add its other sections."""
    sections = dict(re.findall(r"^(\[\w+\])$(.*?)(?=^\[|\Z)", further, flags=re.DOTALL | re.MULTILINE))
    for name, body in sections.items():
        before, found, after = config.partition(f"\n{name}\n")
        rest = after[after.index("\n[") :] if found and "\n[" in after else ""
        config = f"{before}\n{name}\n{body}{rest}"
    return config


@pytest.mark.parametrize("further", ["", *CHAPTERS])
def test_the_configurations_pass_their_check(tmp_path: Path, further: str) -> None:
    assert len(CHAPTERS) == 3
    (tmp_path / "sines.toml").write_text(with_sections(CONFIG, further))
    assert all(line in (tmp_path / "sines.toml").read_text() for line in further.splitlines())
    own = ["--set", "engine.rendezvous=127.0.0.1:29400"] if "rendezvous" in further else []
    done = run("-m", "online_meta", "check", "sines.toml", "--set", "serve.port=0", *own, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "finite meta-gradient" in done.stdout


def test_the_example_writes_a_task(tmp_path: Path) -> None:
    (make_task,) = (block for block in code_of(SERVE, "python") if "my-first-task" in block)
    (tmp_path / "make_task.py").write_text(make_task)
    assert run("make_task.py", cwd=tmp_path).returncode == 0
    assert (tmp_path / "my-first-task.safetensors").exists()


@pytest.mark.parametrize("page", [README, read_page("how-to/notebook.md")], ids=["README", "notebook"])
def test_the_notebooks_run(tmp_path: Path, page: str) -> None:
    (notebook,) = code_of(page, "python")
    (tmp_path / "notebook.py").write_text(notebook)
    done = run("notebook.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("->") == 20


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_local_link_has_a_target(page: Path) -> None:
    for link in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8")):
        assert (page.parent / link).exists(), f"{page} links to {link}, which does not exist"


def test_every_heading_that_the_readme_links_to_exists() -> None:
    for link, heading in re.findall(r"\]\((?!https?:)([^)#]+)#([^)]+)\)", README):
        titles = re.findall(r"(?m)^#+ (.+)$", (ROOT / link).read_text(encoding="utf-8"))
        assert heading in [re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles]
