"""What the daemon's child processes do when they start."""

import subprocess
import sys

import pytest

from tests.support.daemon import ROOT

WAITING = """
import os, signal, threading
from deploy.processes.child import stop_on_signals

for _ in range(300):
    stop = stop_on_signals()
    threading.Timer(0.002, os.kill, (os.getpid(), signal.SIGTERM)).start()
    while not stop.wait(0.0):
        pass
print("stopped each time")
"""


@pytest.mark.timeout(120)
def test_a_signal_stops_a_waiting_thread_at_any_moment() -> None:
    """This holds even while the waiting thread holds the lock of the event that it waits for."""
    done = subprocess.run([sys.executable, "-c", WAITING], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.stdout == "stopped each time\n", done.stderr
