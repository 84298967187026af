"""A wall clock that jumps under a daemon: libfaketime moves CLOCK_REALTIME and leaves the monotonic clock as it is."""

import os
from pathlib import Path

SLEEP = '''"""Loaded by each Python under the shifted clock, before anything else.

Python sleeps until a moment of the monotonic clock (clock_nanosleep, TIMER_ABSTIME). libfaketime up to 0.9.10 takes
that for a moment of the shifted clock, and the kernel answers EINVAL (wolfcw/libfaketime#426); select waits a length.
"""

import select
import time


def sleep(seconds):
    if seconds < 0:
        raise ValueError("sleep length must be non-negative")
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0:
        select.select([], [], [], left)


time.sleep = sleep
'''


class Clock:
    """The wall clock of the processes that are started in ``surroundings``."""

    def __init__(self, folder: Path, library: Path) -> None:
        """Keep what shifts it in ``folder``; ``library`` is libfaketimeMT.so.1."""
        self.file = folder / "clock"
        (site := folder / "site").mkdir()
        (site / "sitecustomize.py").write_text(SLEEP)
        path = os.pathsep.join([str(site), *filter(None, [os.environ.get("PYTHONPATH")])])
        self.surroundings = {
            **os.environ,
            "PYTHONPATH": path,
            "LD_PRELOAD": str(library.absolute()),
            "FAKETIME_TIMESTAMP_FILE": str(self.file),
            "FAKETIME_CACHE_DURATION": "1",  # seconds; without it each look at the clock opens the file
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            "NO_FAKE_STAT": "1",
        }
        self.shift("+0")

    def shift(self, by: str) -> None:
        """Let it be off by so much from now on: "+0", "+3h", "-2d"."""
        new = self.file.with_suffix(".new")
        new.write_text(by + "\n")
        new.rename(self.file)
