"""Compile a recorded program in a process of its own, beside the work that goes on, into a folder that keeps it."""

import contextlib
import hashlib
import logging
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_flatten, tree_leaves, tree_structure, tree_unflatten

from online_meta.batching.plan import StackedSum
from online_meta.types import Meta, MetaGrad, Task

Program = Callable[..., tuple[Tensor, ...]]
"""A sum over stacked tasks with nothing but tensors for arguments and results, in the order of their trees."""


ALIASING_OPERATIONS = (torch.ops.aten.detach.default, torch.ops.aten.alias.default)


class Traced(NamedTuple):
    """A recorded program, what it was recorded with, and the digest of all that its bits depend on."""

    graph: GraphModule
    leaves: tuple[Tensor, ...]
    digest: str

    @property
    def size(self) -> int:
        """How many operations it has."""
        return len(self.graph.graph.nodes)


def trace(stacked_sum: StackedSum, meta: Meta, stacked: Task, weights: Tensor) -> Traced:
    """Return ``stacked_sum`` as the operations that it makes for tensors of these shapes.

    What is computed twice in the same way, as the adjoint recursion computes a step again going back, is computed
    once in the program. Raises whatever the model raises when its Python depends on the values of tensors.
    """
    given, structure = tree_flatten((meta, stacked, weights))
    # Each input a tensor of its own: a tensor that is given twice makes a wrong program.
    leaves = tuple(leaf.detach().clone() for leaf in given)

    def program(*leaves: Tensor) -> tuple[Tensor, ...]:
        return tuple(tree_leaves(stacked_sum(*tree_unflatten(leaves, structure))))

    recorded = make_fx(torch.func.functionalize(program))(*leaves)
    graph = GraphModule(recorded, _merge_equal_calls(recorded.graph))
    return Traced(graph, leaves, _digest(graph, leaves))


def _merge_equal_calls(graph: Graph) -> Graph:
    """Take out of a graph what it computes twice; a mere other name for a tensor hides no equal.

    A graph that writes to tensors is left as it is: what is equal there may be so at one moment only.
    """
    calls = [node for node in graph.nodes if node.op == "call_function"]
    if any(getattr(node.target, "_schema", None) and node.target._schema.is_mutable for node in calls):
        return graph
    seen: dict[Any, Node] = {}
    for node in calls:
        first = node.args[0] if node.target in ALIASING_OPERATIONS else seen.setdefault(_call_key(node), node)
        if first is not node:
            node.replace_all_uses_with(first)
            graph.erase_node(node)
    graph.eliminate_dead_code()
    return graph


def _call_key(node: Node) -> Any:
    """Return what decides a call's result; 1 and 1.0 differ."""

    def frozen(argument: Any) -> Any:
        return (type(argument), tuple(map(frozen, argument)) if isinstance(argument, list | tuple) else argument)

    return node.target, frozen(node.args), tuple((name, frozen(value)) for name, value in sorted(node.kwargs.items()))


def as_stacked_sum(program: Program) -> StackedSum:
    """Return a flat program, traced or compiled, as a sum over stacked tasks."""

    def stacked_sum(meta: Meta, stacked: Task, weights: Tensor) -> MetaGrad:
        loss, *grads = program(*tree_leaves((meta, stacked, weights)))
        found: MetaGrad = tree_unflatten([loss, *grads], tree_structure(MetaGrad(loss, meta)))
        return found

    return stacked_sum


def _digest(graph: GraphModule, leaves: tuple[Tensor, ...]) -> str:
    """Sum up all that the program's bits depend on: operations, constants, shapes, torch, processor, threads."""
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
    """A compilation under way: ``_compile_worker.py`` as a child of low priority.

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
