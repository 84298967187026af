"""The resident memory and the open descriptors of each process of a daemon over its life."""

import os
import threading
import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple

import numpy as np
import psutil
from numpy.typing import NDArray

from tests.support.daemon import RestartedDaemon

Floats = NDArray[np.float64]
WARM_UP_SECONDS = 60.0
MOST_PER_MINUTE = (2.0, 0.5)
"""The largest growth in MiB and in files per minute that counts as flat; this limit matters in a long life."""
MOST_AT_ALL = (8.0, 3.0)
"""The largest total growth; this limit matters in a short life, in which the growth per minute is noisy."""
FEWEST_SAMPLES = 30
MOST_SAMPLES = 600
"""A longer life is thinned to this many samples, because the work grows with the square."""


class Sample(NamedTuple):
    """A measurement; ``files`` excludes sockets, because they come and go with the clients."""

    second: float
    mib: float
    files: int


class Trend(NamedTuple):
    """The slopes of the samples after the warm-up, over ``minutes``."""

    minutes: float
    mib_per_minute: float
    files_per_minute: float

    @property
    def flat(self) -> bool:
        """Return whether both slopes are within the limits above."""
        found = zip(self[1:], MOST_PER_MINUTE, MOST_AT_ALL, strict=True)
        return all(slope <= max(slow, most / self.minutes) for slope, slow, most in found)


def trend(samples: Sequence[Sample]) -> Trend | None:
    """Fit lines to the samples after the warm-up; None if there are too few."""
    warm = [sample for sample in samples if sample.second - samples[0].second >= WARM_UP_SECONDS]
    if len(warm) < FEWEST_SAMPLES:
        return None
    minutes, mib, files = np.array(warm[:: max(1, len(warm) // MOST_SAMPLES)], np.float64).T / [[60.0], [1.0], [1.0]]
    return Trend(float(minutes[-1] - minutes[0]), slope_of(minutes, mib), slope_of(minutes, files))


def slope_of(times: Floats, values: Floats) -> float:
    """Return the median slope of all pairs (Theil and Sen), which tolerates outliers in a quarter of the values."""
    one, other = np.triu_indices(len(times), 1)
    return float(np.median((values[other] - values[one]) / (times[other] - times[one])))


class Watcher(threading.Thread):
    """Measures the processes every second until ``enough`` is set; ``lives`` are by (role, process id)."""

    def __init__(self, served: RestartedDaemon) -> None:
        super().__init__(daemon=True)
        self.served = served
        self.enough = threading.Event()
        self.began = time.monotonic()
        self.lives: dict[tuple[str, int], list[Sample]] = defaultdict(list)

    def run(self) -> None:
        while not self.enough.wait(1.0):
            try:
                daemon = psutil.Process(self.served.process.pid)
                self._measure("daemon", daemon)
                for child in daemon.children():
                    self._measure(role_of(child), child)
            except (psutil.Error, FileNotFoundError):
                continue  # the process has just been killed

    def stop(self) -> None:
        """Stop measuring."""
        self.enough.set()
        self.join()

    def _measure(self, role: str, process: psutil.Process) -> None:
        with process.oneshot():
            second = time.monotonic() - self.began
            mib, files = process.memory_info().rss / 2**20, process.num_fds() - count_sockets(process.pid)
        self.lives[role, process.pid].append(Sample(second, mib, files))


def count_sockets(pid: int) -> int:
    """Return how many sockets a process has open."""
    count = 0
    with os.scandir(f"/proc/{pid}/fd") as listing:
        for item in listing:
            with suppress(FileNotFoundError):  # the descriptor has just been closed
                count += os.readlink(item.path).startswith("socket:")
    return count


def role_of(process: psutil.Process) -> str:
    """Return the name of a child of the daemon, such as "trainer" or "comparators", else its program's name."""
    named = [word for word in process.cmdline() if word.startswith("deploy.")]
    return named[0].removeprefix("deploy.") if named else process.name()
