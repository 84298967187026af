"""What the README shows works as it stands there."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {"PYTHONPATH": str(Path(__file__).parents[2]), "PATH": "/usr/bin:/bin"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )


def with_sections(config: str, further: str) -> str:
    """Put the sections of a later chapter in the place of those that the first configuration has under their names."""
    sections = dict(re.findall(r"^(\[\w+\])$(.*?)(?=^\[|\Z)", further, flags=re.DOTALL | re.MULTILINE))
    for name, body in sections.items():
        before, found, after = config.partition(f"\n{name}\n")
        rest = after[after.index("\n[") :] if found and "\n[" in after else ""
        config = f"{before}\n{name}\n{body}{rest}"
    return config


@pytest.mark.parametrize("further", ["", *blocks("toml")[1:]])
def test_the_configurations_pass_their_check(tmp_path: Path, further: str) -> None:
    config, *chapters = blocks("toml")
    assert len(chapters) == 3
    (tmp_path / "sines.toml").write_text(with_sections(config, further))
    assert all(line in (tmp_path / "sines.toml").read_text() for line in further.splitlines())
    done = run("-m", "online_meta", "check", "sines.toml", "--set", "serve.port=0", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "finite meta-gradient" in done.stdout


def test_the_python_examples_run(tmp_path: Path) -> None:
    make_task, notebook = blocks("python")
    (tmp_path / "make_task.py").write_text(make_task)
    (tmp_path / "notebook.py").write_text(notebook)
    assert run("make_task.py", cwd=tmp_path).returncode == 0
    assert (tmp_path / "my-first-task.safetensors").exists()
    done = run("notebook.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("->") == 20


def test_every_local_link_leads_somewhere() -> None:
    for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (Path(__file__).parents[2] / link).exists(), f"the README links to {link}, which is not there"
