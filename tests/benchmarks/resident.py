"""Measure the peak memory of compiled programs: the resident pages that one call adds, in a fresh process.

``python -m tests.benchmarks.resident WORK CONTESTANT FOLDER`` prints them. The allocator is configured to return freed
memory, so that every call starts from the same level. Only Linux can reset the peak (``clear_refs``, proc(5)).
"""

import ctypes
import gc
import os
import subprocess
import sys
from pathlib import Path

RETURN_MEMORY = {"MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}


def measure_resident_bytes(work: str, contestant: str, programs: Path) -> int | None:
    """Return the peak of one call above the resident memory before it; None if the system cannot measure it."""
    command = [sys.executable, "-m", "tests.benchmarks.resident", work, contestant, str(programs)]
    done = subprocess.run(command, env=os.environ | RETURN_MEMORY, capture_output=True, text=True, check=False)
    return int(done.stdout) if done.returncode == 0 and done.stdout.strip() else None


def main(work_name: str, contestant: str, programs: Path) -> None:
    """Print the bytes that the third call adds at its peak."""
    import torch

    from tests.benchmarks.contestants import CONTESTANTS
    from tests.benchmarks.works import WORKS

    torch.set_num_threads(1)
    work = WORKS[work_name]
    tasks = [work.task(seed) for seed in range(work.timed)]
    call = CONTESTANTS[contestant](work, work.weights(), tasks, programs)
    call()
    call()
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = read_kilobytes("VmRSS")
    call()
    print(1024 * max(0, read_kilobytes("VmHWM") - before))


def read_kilobytes(field: str) -> int:
    """Return a figure of this process from proc(5), such as VmRSS or VmHWM."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
