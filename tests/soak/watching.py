"""The resident memory and the open descriptors of each process of a daemon, over its life."""

import threading
import time
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import psutil

from tests.recovery.served import Served

WARM_UP_SECONDS = 60.0
MOST_MIB_PER_MINUTE = 4.0
MOST_DESCRIPTORS_PER_MINUTE = 2.0
FEWEST_SAMPLES = 30


class Sample(NamedTuple):
    second: float
    mib: float
    descriptors: int


class Trend(NamedTuple):
    """What the samples after the warm-up come to; ``flat`` when both slopes are within the bounds above."""

    mib_per_minute: float
    descriptors_per_minute: float

    @property
    def flat(self) -> bool:
        return self.mib_per_minute <= MOST_MIB_PER_MINUTE and self.descriptors_per_minute <= MOST_DESCRIPTORS_PER_MINUTE


def trend(samples: Sequence[Sample]) -> Trend | None:
    """Fit lines to a process's life after its warm-up; None where that is too short to say."""
    warm = [sample for sample in samples if sample.second - samples[0].second >= WARM_UP_SECONDS]
    if len(warm) < FEWEST_SAMPLES:
        return None
    minutes = [sample.second / 60 for sample in warm]
    slopes = (float(np.polyfit(minutes, [float(sample[column]) for sample in warm], 1)[0]) for column in (1, 2))
    return Trend(*slopes)


class Watcher(threading.Thread):
    """Looks at the processes every second until ``enough`` is set; ``lives`` are by (role, process id)."""

    def __init__(self, served: Served) -> None:
        super().__init__(daemon=True)
        self.served = served
        self.enough = threading.Event()
        self.began = time.monotonic()
        self.lives: dict[tuple[str, int], list[Sample]] = defaultdict(list)

    def run(self) -> None:
        while not self.enough.wait(1.0):
            try:
                daemon = psutil.Process(self.served.process.pid)
                self._look("daemon", daemon)
                for child in daemon.children():
                    self._look(role_of(child), child)
            except psutil.Error:
                continue  # It has just been killed.

    def _look(self, role: str, process: psutil.Process) -> None:
        with process.oneshot():
            second = time.monotonic() - self.began
            sample = Sample(second, process.memory_info().rss / 2**20, process.num_fds())
        self.lives[role, process.pid].append(sample)


def role_of(process: psutil.Process) -> str:
    """Return the name of a child of the daemon: "trainer", "hindsight" or what else it may be."""
    named = [word for word in process.cmdline() if word.startswith("deploy.")]
    return named[0].removeprefix("deploy.") if named else process.name()
