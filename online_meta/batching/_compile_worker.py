"""Compile one program: ``python -P _compile_worker.py SOURCE.pt2 TARGET.pt2 THREADS``; imports only torch."""

import os
import signal
import sys
import threading
from pathlib import Path

import torch

TRY_LATER = 75


def main(source: Path, target: Path, threads: int) -> None:
    """Compile the program that ``torch.export`` saved at ``source``; rename the finished package to ``target``."""
    threading.Thread(target=_die_with_parent, daemon=True).start()
    os.nice(5)  # Lower priority than training, higher than the comparator, which is not urgent.
    torch.set_num_threads(threads)
    part = target.with_name(f"{target.stem}.{os.getpid()}.part.pt2")
    try:
        torch._inductor.aoti_compile_and_package(torch.export.load(source), package_path=str(part))
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)


def _die_with_parent() -> None:
    """Exit as soon as standard input closes, which happens when the parent process dies."""
    while os.read(sys.stdin.fileno(), 1):
        pass
    if os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)  # with the compilers that this process runs
    os._exit(TRY_LATER)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
