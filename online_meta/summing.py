"""The sum of meta-gradients over tasks, by the paths that it is told to follow."""

import logging
import time
from collections.abc import Iterable, Sequence
from pathlib import Path as Folder

from torch import Tensor

from online_meta.compiling import compile_now, load
from online_meta.paths import LOOP, Chunk, Part, Path, parts, row_of, rows_of, signature_of, stack, vmapped
from online_meta.tracing import Program, as_chunk, trace
from online_meta.tree import add, scale
from online_meta.types import Meta, MetaGrad, MetaGradient, Task

log = logging.getLogger(__name__)


def loop_over(gradient: MetaGradient, meta: Meta, part: Part) -> MetaGrad:
    """Return the weighted sum over a part's tasks, one by one in their order."""
    total: MetaGrad | None = None
    for task, weight in zip(part.tasks, part.weights, strict=True):
        share = gradient(meta, task)
        share = share if weight == 1.0 else scale(share, weight)
        total = share if total is None else add(total, share)
    assert total is not None
    return total


class TaskSum:
    """(meta, tasks, weights) -> sum_i weights_i * gradient(meta, task_i), to the bit a function of these and ``paths``.

    The tasks may differ in shape: those of a signature that has a path go by it, all others one by one.
    ``seconds`` is the time that all sums so far have taken.
    """

    def __init__(self, gradient: MetaGradient, folder: Folder | None = None) -> None:
        """Begin with the loop; compiled programs lie in ``folder``, which nobody else may write to."""
        self.gradient = gradient
        self.paths: dict[str, Path] = {}
        self.seconds = 0.0
        self._folder = folder
        self._chunks: dict[Path, Chunk] = {}

    def follow(self, paths: Iterable[Path]) -> None:
        """Go by these paths from now on."""
        self.paths = {path.signature: path for path in paths}

    def add_program(self, path: Path, program: Program) -> None:
        """Take in a program that was compiled for a path, so that following it need not look for it."""
        self._chunks[path] = as_chunk(program)

    def __call__(self, meta: Meta, tasks: Sequence[Task], weights: Sequence[float]) -> MetaGrad:
        """Return the weighted sum; raises ``ValueError`` for no tasks."""
        total: MetaGrad | None = None
        began = time.perf_counter()
        for part in parts(tasks, weights, self.paths):
            share = self._sum(self.paths.get(part.signature, LOOP), meta, part)
            total = share if total is None else add(total, share)
        if total is None:
            raise ValueError("a meta-gradient over no tasks is not defined: give one task or more")
        self.seconds += time.perf_counter() - began
        return total

    def of_stacked(self, meta: Meta, stacked: Task, weights: Tensor) -> MetaGrad:
        """Return the weighted sum over tasks that are stacked along a first dimension already."""
        path = self.paths.get(signature_of(row_of(stacked, 0)), LOOP)
        if path.how == "vmap" or (path.how != "loop" and path.tasks == len(weights)):
            return self._chunk(path, meta, stacked, weights)(meta, stacked, weights)
        return self(meta, rows_of(stacked), weights.tolist())

    def _sum(self, path: Path, meta: Meta, part: Part) -> MetaGrad:
        if path.how == "loop":
            return loop_over(self.gradient, meta, part)
        rows = len(part.tasks) if path.how == "vmap" else path.tasks
        stacked, weights = stack(part, rows, next(iter(meta.weights.values())))
        return self._chunk(path, meta, stacked, weights)(meta, stacked, weights)

    def _chunk(self, path: Path, meta: Meta, stacked: Task, weights: Tensor) -> Chunk:
        if path not in self._chunks:
            self._chunks[path] = self._prepare(path, meta, stacked, weights)
        return self._chunks[path]

    def _prepare(self, path: Path, meta: Meta, stacked: Task, weights: Tensor) -> Chunk:
        chunk = vmapped(self.gradient)
        if path.how == "vmap":
            return chunk
        program = load(self._folder, path.program) if path.how == "compiled" and self._folder and path.program else None
        if program is not None:
            return as_chunk(program)
        traced = trace(chunk, meta, stacked, weights)
        if path.program and traced.digest != path.program:
            log.warning("the program %s is not to be had here: another model, torch or processor?", path.program)
        if path.how == "traced":
            return as_chunk(traced.graph)
        if self._folder is None:
            raise ValueError("a compiled path needs a folder for its program")
        return as_chunk(load(self._folder, traced.digest) or compile_now(traced, self._folder))
