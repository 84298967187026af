"""Derivatives of functions of nested tensors: plain autograd, or ``torch.func`` inside one of its transforms."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from online_meta.types import Params


def is_transformed() -> bool:
    """Return whether this runs inside ``vmap`` or another transform, where plain autograd cannot go.

    Outside of them plain autograd gives the same derivatives at a third of the overhead.
    """
    return peek_interpreter_stack() is not None


def gradient(objective: Callable[[Params], Tensor], at: Params) -> Params:
    """Return d objective / d at, by name.

    It can be differentiated once more where a graph is being recorded, and inside a transform.
    """
    if is_transformed():
        found: Params = torch.func.grad(objective)(at)
        return found
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # A value in a graph stays in it; for one that is in none, or whose graph nobody records, a leaf of its own.
        at = {n: v if create_graph and v.requires_grad else v.detach().requires_grad_() for n, v in at.items()}
        loss = objective(at)
        if not (at and loss.requires_grad):
            return {name: torch.zeros_like(value) for name, value in at.items()}
        # Nothing is done to a parameter that the loss does not depend on: its gradient is zeros.
        # In this very thread, on a GPU too: it may hold the lock on torch's random numbers, and dropout that is
        # computed again going back takes it once more.
        with torch.autograd.set_multithreading_enabled(False):
            grads = torch.autograd.grad(
                loss, [*at.values()], create_graph=create_graph, allow_unused=True, materialize_grads=True
            )
    return dict(zip(at, grads, strict=True))


def vjp(function: Callable[..., Any], *primals: Any) -> tuple[Any, Callable[[Any], Any]]:
    """Return ``function(*primals)`` and the map from a cotangent of it to those of the primals, to be called once.

    ``torch.func.vjp`` for nested tensors, without its overhead where that can be had.
    """
    if is_transformed():
        result: tuple[Any, Callable[[Any], Any]] = torch.func.vjp(function, *primals)[:2]
        return result
    leaves, structure = tree_flatten(primals)
    with torch.enable_grad():
        fresh = [leaf.detach().requires_grad_() for leaf in leaves]
        value = function(*tree_unflatten(fresh, structure))
    ends = [_gradient_edge(output) for output in tree_flatten(value)[0]]

    def pull(cotangent: Any) -> Any:
        pairs = zip(ends, tree_flatten(cotangent)[0], strict=True)
        depends = [(end, given) for end, given in pairs if end is not None]
        ends.clear()  # and with them the graph, however long the caller keeps this function
        if not (depends and fresh):
            return tree_unflatten([torch.zeros_like(leaf) for leaf in fresh], structure)
        outputs, cotangents = zip(*depends, strict=True)
        grads = torch.autograd.grad(outputs, fresh, cotangents, allow_unused=True, materialize_grads=True)
        return tree_unflatten(list(grads), structure)

    return tree_map(torch.Tensor.detach, value), pull


def _gradient_edge(output: Tensor) -> Tensor | GradientEdge | None:
    """Return where going back begins, without the output's memory where that can be had; None without a graph."""
    if not output.requires_grad:
        return None
    return output if output.is_leaf else get_gradient_edge(output)
