"""Small inputs that once showed a fault, each in a file of its own, which exits with "FAULT: ..." if it shows it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.house.sources import ROOT

CASES = sorted(Path(__file__).parent.glob("[0-9]*.py"))


def run_case(case: Path) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, str(case)]
    path = {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        command, cwd=ROOT, env={**os.environ, **path}, capture_output=True, text=True, timeout=300, check=False
    )


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.stem)
def test_the_fault_is_fixed(case: Path) -> None:
    done = run_case(case)
    assert done.returncode == 0, done.stdout + done.stderr
