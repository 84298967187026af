"""A compiler in place of torch's, for tests of what is compiled, when, and how often."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from online_meta.batching import autotune, compile
from online_meta.batching.compile import Traced

WORKER = """
import pathlib, sys, time
with open({counter!r}, "a") as file:
    file.write("x")
while pathlib.Path({hold!r}).exists():
    time.sleep(0.01)
if pathlib.Path({fail!r}).exists():
    sys.exit("no compiler")
pathlib.Path(sys.argv[2]).write_bytes(b"machine code")
"""


class Compiler:
    """It counts what it compiles, and its programs compute what was recorded.

    It measures no time. Each method seems faster than the methods before it; with ``slow``, compiled programs seem
    slower. A compilation continues while the file ``hold`` exists, and fails if the file ``fail`` exists. ``spoil``
    changes all results.
    """

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        """Take the place of torch's compiler; ``folder`` is for files of its own."""
        self.counter, self.hold, self.fail = folder / "count", folder / "hold", folder / "fail"
        self.spoil: Callable[[Any], Any] = lambda results: results
        self._graphs: dict[str, Any] = {}
        self.slow = False
        self._measured = self._runs = 0
        worker = folder / "worker.py"
        worker.write_text(WORKER.format(counter=str(self.counter), hold=str(self.hold), fail=str(self.fail)))
        write = compile._write_source

        def write_and_remember(traced: Traced, *rest: Any) -> None:
            self._graphs[traced.digest] = traced.graph
            write(traced, *rest)

        patch.setattr(compile, "WORKER_SCRIPT", worker)
        patch.setattr(compile, "_write_source", write_and_remember)
        patch.setattr(autotune, "_median_seconds", self._measure)
        patch.setattr(torch._C._aoti, "AOTIModelPackageLoader", self._load)

    @property
    def count(self) -> int:
        """How many programs it has begun to compile."""
        return len(self.counter.read_text()) if self.counter.exists() else 0

    def _measure(self, work: Callable[[], Any]) -> float:
        before, self._measured = self._runs, self._measured + 1
        work()
        return 1e6 if self.slow and self._runs > before else 1.0 / self._measured

    def _load(self, path: str, *options: Any) -> Any:
        digest = Path(path).stem

        def run(leaves: list[torch.Tensor]) -> Any:
            self._runs += 1
            return self.spoil(self._graphs[digest](*leaves))

        return SimpleNamespace(boxed_run=run)
