"""Record a sum over stacked tasks as a program and compile it in a background process into a folder of programs."""

import contextlib
import hashlib
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from online_meta.batching.plan import StackedSum
from online_meta.batching.programs import (
    CompilerBusy,
    Program,
    Programs,
    as_programs,
    find_exposure,
    keep_program,
    load_program,
    lock_compiler,
    package_path,
    record_path,
)
from online_meta.functional.recording import flatten, record_operations
from online_meta.types import Meta, MetaGrad, Task


class CompileStopped(BaseException):
    """A compilation was abandoned because the process is to end; like ``KeyboardInterrupt``, it is not an error."""


STOP_CHECK_SECONDS = 0.2


def always_continue() -> bool:
    """Return True: nothing asks the process to end."""
    return True


class _StopCheck(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A mode that asks before each tensor operation whether to continue, and raises ``CompileStopped`` if not."""

    def __init__(self, should_continue: Callable[[], bool]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._should_continue = should_continue

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self._should_continue():
            raise CompileStopped("stopped before compiling")
        return func(*args, **(kwargs or {}))


class Traced(NamedTuple):
    """A recorded program, the inputs it was recorded with, and the digest of everything its results depend on."""

    graph: GraphModule
    leaves: tuple[Tensor, ...]
    digest: str

    @property
    def size(self) -> int:
        """The number of operations in the program."""
        return len(self.graph.graph.nodes)


def trace(
    stacked_sum: StackedSum,
    meta: Meta,
    stacked: Task,
    weights: Tensor,
    should_continue: Callable[[], bool] = always_continue,
) -> Traced:
    """Record the operations that ``stacked_sum`` executes for tensors of these shapes.

    Equal computations are merged: the adjoint recursion recomputes each inner step in its backward pass, and the
    program computes it once. Raises the model's own error if its Python code depends on tensor values, and
    ``CompileStopped`` as soon as ``should_continue``, which is called before each operation, returns False.
    """
    given, structure = tree_flatten((meta, stacked, weights))
    # Clone each input: make_fx records a wrong program if one tensor is passed twice.
    leaves = tuple(leaf.detach().clone() for leaf in given)

    def program(*leaves: Tensor) -> tuple[Tensor, ...]:
        return tuple(tree_leaves(stacked_sum(*tree_unflatten(leaves, structure))))

    with _StopCheck(should_continue):
        graph = record_operations(program, leaves)
    return Traced(graph, leaves, _digest(graph, leaves))


def as_stacked_sum(program: Program) -> StackedSum:
    """Wrap a flat program, traced or compiled, as a sum over stacked tasks."""

    def stacked_sum(meta: Meta, stacked: Task, weights: Tensor) -> MetaGrad:
        leaves = [*meta.weights.values(), *meta.rule.values()]
        flatten(stacked, leaves)
        loss, *grads = program(*leaves, weights)
        first, others = zip(meta.weights, grads, strict=False), grads[len(meta.weights) :]
        return MetaGrad(loss, Meta(dict(first), dict(zip(meta.rule, others, strict=True))))

    return stacked_sum


def _digest(graph: GraphModule, leaves: tuple[Tensor, ...]) -> str:
    """Hash everything the results depend on: operations, constants, shapes, torch version, CPU, number of threads."""
    ingredients = [graph.code, torch.__version__, torch.backends.cpu.get_cpu_capability(), str(torch.get_num_threads())]
    ingredients += [f"{leaf.dtype} {[*leaf.shape]} {leaf.stride()} {leaf.device}" for leaf in leaves]
    digest = hashlib.sha256("\n".join(ingredients).encode())
    for name, constant in sorted([*vars(graph).items(), *graph.named_buffers()], key=lambda item: item[0]):
        if isinstance(constant, Tensor):
            raw = constant.detach().cpu().contiguous().view(-1).view(torch.uint8)
            digest.update(name.encode() + raw.numpy().tobytes())
    return digest.hexdigest()[:32]


PROGRESS_SECONDS = 10.0


WORKER_SCRIPT = Path(__file__).with_name("_compile_worker.py")


log = logging.getLogger(__name__)


class CompileError(RuntimeError):
    """A compilation failed; the other batching modes still work."""

    is_lasting = False
    """Whether the compiler itself refused the program, so that it would do so again."""


class Compilation:
    """A running compilation: ``_compile_worker.py`` as a child process of low priority.

    The child exits when this process does. Compiling needs a C++ compiler on the machine, on which one program is
    compiled at a time.
    """

    def __init__(
        self, traced: Traced, place: Path | Programs, should_continue: Callable[[], bool] = always_continue
    ) -> None:
        """Write the program to the folder of ``place`` and start to compile it there.

        Raises:
            CompilerBusy: while another program is compiled.
            CompileError: for a program with parts that cannot be compiled, or a folder that others can write to.
            CompileStopped: as soon as ``should_continue`` returns False.
        """
        self._place, folder = place, as_programs(place).folder
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if exposure := find_exposure(folder):
            raise CompileError(f"no program is compiled into {folder}: it {exposure}")
        self._lock = lock_compiler(place)
        try:
            self._start(traced, folder, should_continue)
        except BaseException:
            os.close(self._lock)
            raise

    def _start(self, traced: Traced, folder: Path, should_continue: Callable[[], bool]) -> None:
        for leftover in folder.glob(f"{traced.digest}.*.part.pt2"):  # by one that was killed
            leftover.unlink()
        record_path(folder, traced.digest).unlink(missing_ok=True)  # It is that of an earlier package.
        self.digest = traced.digest
        self._folder = folder
        self._source = folder / f"{traced.digest}.source"
        self._log = folder / f"{traced.digest}.log"
        self._began = self._last_logged = time.monotonic()
        _write_source(traced, self._source, should_continue)
        # By its place, for a notebook may have found this package where its children would not; -P: not our types.py.
        command = [sys.executable, "-P", WORKER_SCRIPT, self._source, package_path(folder, self.digest)]
        with self._log.open("wb") as output:
            self._child = subprocess.Popen(
                [*map(str, command), str(torch.get_num_threads())],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                pass_fds=(self._lock,),  # It holds the lock as long as it runs.
                process_group=0,  # The compilers that it runs end with it, and a signal of the terminal ends neither.
            )
        log.info("compiling a program of %d operations in the background", traced.size)

    def poll(self) -> Program | None:
        """Return the program, or None while it is still being compiled; log the elapsed time now and then.

        Raises ``CompileError`` with the last line of the compiler's output if it failed.
        """
        self._log_progress()
        code = self._child.poll()
        if code is None:
            return None
        self.close()
        program = load_program(self._folder, self.digest) if code == 0 else None
        if program is None:
            error = CompileError(f"compiling ended with exit code {code}: {self._last_line()}")
            error.is_lasting = code > 0
            raise error
        keep_program(self._place, self.digest)
        log.info("compiled in %.0f s", time.monotonic() - self._began)
        self._log.unlink(missing_ok=True)
        return program

    def wait(self, should_continue: Callable[[], bool] = always_continue) -> None:
        """Wait until the child has finished; log the elapsed time now and then.

        Stops the child and raises ``CompileStopped`` as soon as ``should_continue`` returns False.
        """
        while self._child.poll() is None:
            if not should_continue():
                self.close()
                raise CompileStopped(f"stopped compiling after {time.monotonic() - self._began:.0f} s")
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._child.wait(STOP_CHECK_SECONDS)
            self._log_progress()

    def _log_progress(self) -> None:
        now = time.monotonic()
        if self._child.poll() is None and now - self._last_logged > PROGRESS_SECONDS:
            self._last_logged = now
            log.info("still compiling after %.0f s", now - self._began)

    def close(self) -> None:
        """Stop the child and its compilers if it is still compiling, and delete the files it needed."""
        if self._child.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._child.pid, signal.SIGKILL)
            self._child.wait()
            self._log.unlink(missing_ok=True)
        if self._child.stdin is not None:
            self._child.stdin.close()
        self._source.unlink(missing_ok=True)
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def _last_line(self) -> str:
        lines = self._log.read_text(errors="replace").strip().splitlines() if self._log.exists() else []
        return lines[-1] if lines else "the compiler printed no output"


def compile_now(
    traced: Traced, place: Path | Programs, should_continue: Callable[[], bool] = always_continue
) -> Program:
    """Compile a program into the folder of ``place``, wait for it and return it.

    While another process compiles, it waits for its turn, and takes the program if it is what that one has compiled.
    Raises ``CompileError`` if that fails, ``CompileStopped`` as soon as ``should_continue`` returns False.
    """
    while True:
        try:
            compilation = Compilation(traced, place, should_continue)
            break
        except CompilerBusy:
            if not should_continue():
                raise CompileStopped("stopped while another program was compiled") from None
            time.sleep(STOP_CHECK_SECONDS)
        if (found := load_program(place, traced.digest)) is not None:
            return found
    compilation.wait(should_continue)
    try:
        program = compilation.poll()
    except CompileError as error:
        if not should_continue():  # The signal that ends this process may have ended the compiler, too.
            raise CompileStopped(str(error)) from error
        raise
    assert program is not None
    return program


def _write_source(traced: Traced, target: Path, should_continue: Callable[[], bool]) -> None:
    """Write a program for ``_compile_worker.py``: a head of JSON with its code and the layouts, then its constants.

    Exporting it takes seconds, so the worker does it.
    """
    found: dict[str, Tensor] = {}
    for node in traced.graph.graph.nodes:
        if node.op == "get_attr":
            constant = getattr(traced.graph, node.target, None)
            if not isinstance(constant, Tensor):
                raise CompileError(f"the program has a part that is no tensor, {node.target}")
            found[node.target] = constant.detach().contiguous().clone()
    layouts = []
    for leaf in traced.leaves:
        if not should_continue():
            raise CompileStopped("stopped before compiling")
        layouts.append([str(leaf.dtype), [*leaf.shape], [*leaf.stride()], str(leaf.device)])
    constants = {name: (str(one.dtype), [*one.shape], str(one.device), one.nbytes) for name, one in found.items()}
    head = json.dumps({"code": traced.graph.code, "leaves": layouts, "constants": constants}).encode()
    data = (one.cpu().reshape(-1).view(torch.uint8).numpy().tobytes() for one in found.values())
    target.write_bytes(b"".join([len(head).to_bytes(8, "little"), head, *data]))
