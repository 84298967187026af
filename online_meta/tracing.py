"""Record a sum over stacked tasks as one flat program of tensor operations."""

import hashlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_flatten, tree_leaves, tree_structure, tree_unflatten

from online_meta.paths import StackedSum
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
