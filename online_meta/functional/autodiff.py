"""Differentiate functions of nested tensors: with plain autograd, or with ``torch.func`` inside its transforms."""

from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from online_meta.types import Params

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def outside_inference_mode(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Return ``function`` so that it can differentiate, whatever the mode of its caller.

    Under ``torch.inference_mode()`` torch records no graph, even where gradients are enabled, and all gradients would
    silently be zero. The function leaves that mode while it runs. Inference tensors among its arguments, which no graph
    may hold, are replaced by copies. The caller's ``torch.no_grad()`` stays in force.
    """

    @wraps(function)
    def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        inside = torch.is_inference_mode_enabled()
        if not (inside or _holds_inference_tensor(args) or _holds_inference_tensor(kwargs)):
            return function(*args, **kwargs)
        # Leaving inference mode enables gradients: restore the caller's choice.
        with torch.inference_mode(False), torch.set_grad_enabled(torch.is_grad_enabled() and not inside):
            args, kwargs = tree_map(_copy_inference_tensor, (args, kwargs))
            return function(*args, **kwargs)

    return call


def _holds_inference_tensor(value: object) -> bool:
    if isinstance(value, Tensor):
        return value.is_inference()
    if isinstance(value, dict):
        return any(map(_holds_inference_tensor, value.values()))
    return isinstance(value, tuple | list) and any(map(_holds_inference_tensor, value))


def _copy_inference_tensor(leaf: object) -> object:
    return leaf.clone() if isinstance(leaf, Tensor) and leaf.is_inference() else leaf


def is_transformed() -> bool:
    """Return whether this runs inside ``vmap`` or another transform, where plain autograd does not work.

    Outside of transforms, plain autograd gives the same derivatives with less overhead.
    """
    return peek_interpreter_stack() is not None


def value_and_gradient(objective: Callable[[Params], Tensor], at: Params) -> tuple[Tensor, Params]:
    """Return objective(at), a scalar, and d objective / d at by name, from one forward and one backward pass.

    Both can be differentiated again if gradients are enabled, and inside a transform.
    """
    if is_transformed():
        found: Params
        value: Tensor
        found, value = torch.func.grad_and_value(objective)(at)
        return value, found
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # Values that are in a recorded graph stay in it; all others become new leaves.
        at = {n: v if create_graph and v.requires_grad else v.detach().requires_grad_() for n, v in at.items()}
        loss = objective(at)
        if not (at and loss.requires_grad):
            return _keep(loss, create_graph), {name: torch.zeros_like(value) for name, value in at.items()}
        # A parameter that the loss does not depend on gets a gradient of zeros.
        # Run the backward pass in this thread, on a GPU too: this thread may hold the (reentrant) lock on torch's
        # random numbers, and recomputed dropout acquires it again.
        with torch.autograd.set_multithreading_enabled(False):
            grads = torch.autograd.grad(
                loss, [*at.values()], create_graph=create_graph, allow_unused=True, materialize_grads=True
            )
    return _keep(loss, create_graph), dict(zip(at, grads, strict=True))


def _keep(value: Tensor, graph: bool) -> Tensor:
    return value if graph else value.detach()


def vjp(function: Callable[..., Any], *primals: Any) -> tuple[Any, Callable[[Any], Any]]:
    """Return ``function(*primals)`` and its pullback: a map from a cotangent of the value to those of the primals.

    This is ``torch.func.vjp`` for nested tensors, with less overhead outside of transforms. Call the pullback once.
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
        ends.clear()  # Free the graph now, even if the caller keeps this function.
        if not (depends and fresh):
            return tree_unflatten([torch.zeros_like(leaf) for leaf in fresh], structure)
        outputs, cotangents = zip(*depends, strict=True)
        grads = torch.autograd.grad(outputs, fresh, cotangents, allow_unused=True, materialize_grads=True)
        return tree_unflatten(list(grads), structure)

    return tree_map(torch.Tensor.detach, value), pull


def _gradient_edge(output: Tensor) -> Tensor | GradientEdge | None:
    """Return the starting point of the backward pass, without the output's memory if possible; None without a graph."""
    if not output.requires_grad:
        return None
    return output if output.is_leaf else get_gradient_edge(output)
