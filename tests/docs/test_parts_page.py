"""The example of the page "How the parts fit" works as printed."""

import subprocess
import sys
from pathlib import Path

from tests.docs.pages import ROOT, assert_shown, code_of, read_page

PAGE = read_page("concepts/how-the-parts-fit.md")


def test_the_example_runs_and_prints_what_the_page_shows(tmp_path: Path) -> None:
    (example,), (shown,) = code_of(PAGE, "python"), code_of(PAGE, "text")
    (tmp_path / "example.py").write_text(example)
    done = subprocess.run(
        [sys.executable, "example.py"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == len(shown.splitlines())
    assert_shown(shown, done.stdout)
