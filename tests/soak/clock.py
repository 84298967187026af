"""A wall clock that jumps under a daemon: libfaketime shifts CLOCK_REALTIME and leaves the monotonic clock alone."""

import os
from pathlib import Path

SLEEP = '''"""Loaded by every Python process with the shifted clock, before anything else.

time.sleep waits until a time of the monotonic clock (clock_nanosleep, TIMER_ABSTIME). libfaketime up to 0.9.10 treats
it as a time of the shifted clock, and the kernel returns EINVAL (wolfcw/libfaketime#426). select waits for a duration.
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
    """The wall clock of the processes that run with ``environment``."""

    def __init__(self, folder: Path, library: Path) -> None:
        """Keep the file of the shift in ``folder``; ``library`` is libfaketimeMT.so.1."""
        self.file = folder / "clock"
        (site := folder / "site").mkdir()
        (site / "sitecustomize.py").write_text(SLEEP)
        path = os.pathsep.join([str(site), *filter(None, [os.environ.get("PYTHONPATH")])])
        self.environment = {
            **os.environ,
            "PYTHONPATH": path,
            "LD_PRELOAD": str(library.absolute()),
            "FAKETIME_TIMESTAMP_FILE": str(self.file),
            "FAKETIME_CACHE_DURATION": "1",  # seconds; without it each read of the clock opens the file
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            "NO_FAKE_STAT": "1",
        }
        self.shift("+0")

    def shift(self, by: str) -> None:
        """Shift the clock from now on by "+0", "+3h", "-2d"."""
        new = self.file.with_suffix(".new")
        new.write_text(by + "\n")
        new.rename(self.file)
