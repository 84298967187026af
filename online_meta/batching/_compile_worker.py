"""Compile one program: ``python -P _compile_worker.py SOURCE.pt2 TARGET.pt2 THREADS``; needs torch alone."""

import os
import sys
import threading
from pathlib import Path

import torch

TRY_LATER = 75


def main(source: Path, target: Path, threads: int) -> None:
    """Compile what ``torch.export`` saved at ``source``; ``target`` appears when it is whole."""
    threading.Thread(target=_die_with_parent, daemon=True).start()
    os.nice(5)  # The work that goes on meanwhile goes first, and this before the comparator, which is in no hurry.
    torch.set_num_threads(threads)
    part = target.with_name(f"{target.stem}.{os.getpid()}.part.pt2")
    try:
        torch._inductor.aoti_compile_and_package(torch.export.load(source), package_path=str(part))
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)


def _die_with_parent() -> None:
    """End as soon as the parent's end of standard input closes, as it does when the parent dies."""
    while os.read(sys.stdin.fileno(), 1):
        pass
    os._exit(TRY_LATER)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
