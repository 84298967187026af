"""Known faults: each numbered file in this folder shows one, and exits with "FAULT: ..." until it is mended.

A fault is an expected failure. A case that shows no fault any more fails, so that it is noticed.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.house.sources import ROOT

CASES = sorted(Path(__file__).parent.glob("[0-9]*.py"))


def run(case: Path) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, str(case)]
    path = {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        command, cwd=ROOT, env={**os.environ, **path}, capture_output=True, text=True, timeout=300, check=False
    )


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.stem)
def test_the_fault_is_mended(case: Path) -> None:
    done = run(case)
    if done.returncode:
        fault = done.stderr.strip().splitlines()[-1]
        assert fault.startswith("FAULT: "), f"{case.name} does not get to its own fault:\n{done.stderr}"
        pytest.xfail(fault)
    raise AssertionError(f"{case.name} shows no fault any more: make a test of it where it belongs, and remove it here")
