"""Small inputs that once showed a fault, each in a file of its own, which exits with "FAULT: ..." if it shows it.

``KNOWN`` are the faults that are not fixed yet: they are expected failures.
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


KNOWN = {
    "02_embedding_padding_idx_refused",
    "04_frozen_bfloat16_backbone",
    "05_buffers_lose_precision_silently",
    "07_targets_that_broadcast",
    "09_advice_that_misleads",
    "11_state_dict_as_weights",
    "18_inference_mode_does_not_adapt",
}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.stem)
def test_the_fault_is_fixed(case: Path) -> None:
    done = run_case(case)
    if case.stem not in KNOWN:
        assert done.returncode == 0, done.stdout + done.stderr
        return
    assert done.returncode, f"{case.name} no longer shows its fault: remove it from KNOWN"
    fault = done.stderr.strip().splitlines()[-1]
    assert fault.startswith("FAULT: "), f"{case.name} does not reach its own fault:\n{done.stderr}"
    pytest.xfail(fault)
