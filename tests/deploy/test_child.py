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


COUNT_FAULTS = """
import resource, torch
from deploy.processes.child import keep_freed_memory

keep_freed_memory()

def allocate():
    tensors = [torch.ones(3_000_000) for _ in range(4)]

for _ in range(3):
    allocate()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    allocate()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
PAGES = 10 * 4 * 3_000_000 * 4 // 4096
"""The pages of 4 KiB that all these tensors take."""


@pytest.mark.skipif(sys.platform != "linux", reason="only the C library of Linux has this option")
def test_the_memory_of_freed_tensors_is_used_again() -> None:
    done = subprocess.run([sys.executable, "-c", COUNT_FAULTS], capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert int(done.stdout) < PAGES / 20, done.stderr
