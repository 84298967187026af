"""Known faults. Each numbered file in this folder demonstrates one, and exits with "FAULT: ..." until it is fixed.

A fault is an expected failure. A case whose fault is fixed fails, so that it gets noticed.
"""

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
    if done.returncode:
        fault = done.stderr.strip().splitlines()[-1]
        assert fault.startswith("FAULT: "), f"{case.name} does not reach its own fault:\n{done.stderr}"
        pytest.xfail(fault)
    raise AssertionError(
        f"{case.name} no longer shows its fault: move it to a test of the code that it covers, and remove it here"
    )
