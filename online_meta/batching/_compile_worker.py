"""Compile one program: ``python -P _compile_worker.py SOURCE TARGET.pt2 THREADS``; imports only torch."""

import json
import os
import signal
import sys
import threading
import warnings
from pathlib import Path
from typing import Any

import torch

TRY_LATER = 75


def main(source: Path, target: Path, threads: int) -> None:
    """Compile the program that ``compile.py`` wrote to ``source``; rename the finished package to ``target``."""
    threading.Thread(target=_die_with_parent, daemon=True).start()
    os.nice(10)  # Lower priority than training and the comparator: what is compiled is needed later.
    torch.set_num_threads(threads)
    torch._inductor.config.compile_threads = 1
    part = target.with_name(f"{target.stem}.{os.getpid()}.part.pt2")
    try:
        torch._inductor.aoti_compile_and_package(export(source), package_path=str(part))
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)


def export(source: Path) -> torch.export.ExportedProgram:
    """Return the program that ``compile.py`` wrote to ``source``, as a graph with the shapes of its inputs."""
    data = source.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    head, constants = json.loads(data[8:start]), {}
    for name, (dtype, shape, device, size) in head["constants"].items():
        part = bytearray(data[start : start + size])
        raw = torch.frombuffer(part, dtype=torch.uint8) if size else torch.empty(0, dtype=torch.uint8)
        constants[name] = raw.view(_find_dtype(dtype)).reshape(shape).to(device)
        start += size
    leaves = tuple(
        torch.empty_strided(shape, stride, dtype=_find_dtype(dtype), device=device).zero_()
        for dtype, shape, stride, device in head["leaves"]
    )
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns about its own internals here
        return torch.export.export(_make_module(head["code"], constants), leaves, strict=False)


def _find_dtype(name: str) -> torch.dtype:
    found: torch.dtype = getattr(torch, name.removeprefix("torch."))
    return found


def _make_module(code: str, constants: dict[str, torch.Tensor]) -> torch.nn.Module:
    """Return a module whose ``forward``, with tensors only, is the method in ``code``."""
    names: dict[str, Any] = {
        "torch": torch,
        "device": torch.device,
        "inf": float("inf"),
        "nan": float("nan"),
        "NoneType": type(None),
    }
    exec(code, names)  # It comes from the process that started this one.
    module: torch.nn.Module = type("Program", (torch.nn.Module,), {"forward": names["forward"]})()
    for name, constant in constants.items():
        module.register_buffer(name, constant)
    return module


def _die_with_parent() -> None:
    """Exit as soon as standard input closes, which happens when the parent process dies."""
    while os.read(sys.stdin.fileno(), 1):
        pass
    if os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)  # with the compilers that this process runs
    os._exit(TRY_LATER)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
