"""Compile a recorded program in a process of its own, beside the work that goes on, into a folder that keeps it."""

import contextlib
import logging
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from online_meta.tracing import Program, Traced

PROGRESS_SECONDS = 10.0
WORKER_SCRIPT = Path(__file__).with_name("compile_program.py")
log = logging.getLogger(__name__)


class CompileError(RuntimeError):
    """A program could not be compiled; the slower ways go on."""


def package_path(folder: Path, digest: str) -> Path:
    """Return where ``folder`` keeps the compiled program of a digest."""
    return folder / f"{digest}.pt2"


def load_program(folder: Path, digest: str) -> Program | None:
    """Return a compiled program that ``folder`` keeps; None when it has none.

    A package holds machine code: only ever load it from a folder that nobody else can write to.
    """
    path = package_path(folder, digest)
    if not path.exists():
        return None
    compiled: Any = torch._inductor.aoti_load_package(str(path))
    return lambda *leaves: tuple(compiled(*leaves))


class Compilation:
    """A compilation under way: ``compile_program.py`` as a child of low priority.

    It dies with this process. Needs a C++ compiler on the machine.
    """

    def __init__(self, traced: Traced, folder: Path) -> None:
        """Write the program into ``folder`` and begin to compile it there."""
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob(f"{traced.digest}.*.part.pt2"):  # by one that was killed
            leftover.unlink()
        self.digest = traced.digest
        self._folder = folder
        self._source = folder / f"{traced.digest}.source.pt2"
        self._log = folder / f"{traced.digest}.log"
        self._began = self._last_logged = time.monotonic()
        _export(traced, self._source)
        # By its place, for a notebook may have found this package where its children would not; -P: not our types.py.
        command = [sys.executable, "-P", WORKER_SCRIPT, self._source, package_path(folder, self.digest)]
        with self._log.open("wb") as output:
            self._child = subprocess.Popen(
                [*map(str, command), str(torch.get_num_threads())],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        log.info("compiling a program of %d operations in the background", traced.size)

    def poll(self) -> Program | None:
        """Return the program if it is there by now; tell now and then how long it has taken.

        Raises ``CompileError`` with the compiler's last words when it failed.
        """
        self._log_progress()
        code = self._child.poll()
        if code is None:
            return None
        self.close()
        program = load_program(self._folder, self.digest) if code == 0 else None
        if program is None:
            raise CompileError(f"compiling ended with exit code {code}: {self._last_line()}")
        log.info("compiled in %.0f s", time.monotonic() - self._began)
        self._log.unlink(missing_ok=True)
        return program

    def wait(self) -> None:
        """Return when ``poll`` has an answer; tell now and then how long it takes."""
        while self._child.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._child.wait(PROGRESS_SECONDS)
            self._log_progress()

    def _log_progress(self) -> None:
        now = time.monotonic()
        if self._child.poll() is None and now - self._last_logged > PROGRESS_SECONDS:
            self._last_logged = now
            log.info("still compiling, for %.0f s", now - self._began)

    def close(self) -> None:
        """Stop compiling, if that still goes on."""
        if self._child.poll() is None:
            self._child.kill()
            self._child.wait()
            self._log.unlink(missing_ok=True)
        if self._child.stdin is not None:
            self._child.stdin.close()
        self._source.unlink(missing_ok=True)

    def _last_line(self) -> str:
        lines = self._log.read_text(errors="replace").strip().splitlines() if self._log.exists() else []
        return lines[-1] if lines else "it said nothing"


def compile_now(traced: Traced, folder: Path) -> Program:
    """Compile a program into ``folder`` and return it; raises ``CompileError``."""
    compilation = Compilation(traced, folder)
    compilation.wait()
    program = compilation.poll()
    assert program is not None
    return program


class _GraphModule(nn.Module):
    """A graph with nothing but tensors for inputs, as ``torch.export`` wants it."""

    def __init__(self, graph: GraphModule) -> None:
        super().__init__()
        self.graph = graph

    def forward(self, *leaves: Tensor) -> Any:
        return self.graph(*leaves)


def _export(traced: Traced, target: Path) -> None:
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, about itself
        torch.export.save(torch.export.export(_GraphModule(traced.graph), traced.leaves, strict=False), target)
