"""A daemon on a full disk."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.deploy.test_start import can_mount
from tests.support.daemon import ROOT

HERE = Path(__file__).parent


@pytest.mark.skipif(not can_mount(), reason="no private mounts here (unshare -rm): no disk that is really full")
def test_a_full_disk_loses_nothing_acknowledged(config: Path) -> None:
    run = config.parent / "run"
    run.mkdir()
    script = 'mount -t tmpfs -o size=6m tmpfs "$1" && exec "$2" "$3" "$4"'
    command = ["unshare", "-rm", "sh", "-c", script, "sh", run, sys.executable, HERE / "fill_disk.py", config]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=280)
    log = config.with_suffix(".log").read_text()
    assert done.stdout == "ok\n", f"{done.stderr}\n{log}"
