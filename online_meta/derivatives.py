"""Are autograd's first and second derivatives right, and if not, in which layer?"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from torch.utils._pytree import tree_flatten, tree_unflatten

from online_meta.slopes import PRECISIONS, Verdict, check_derivative, directional_derivative
from online_meta.types import Params
from online_meta.watch import LayerCall, LayerTrace


def check_gradient(objective: Callable[[Params], Tensor], at: Params) -> Verdict:
    """Return whether autograd's gradient of ``objective`` is its slope."""
    found = autograd_gradient(objective, at)
    with torch.no_grad():
        return check_derivative(objective, directional_derivative(found), at, PRECISIONS[next(iter(at.values())).dtype])


def check_second_derivative(objective: Callable[[Params], Tensor], at: Params) -> Verdict:
    """Return whether autograd's second derivative of ``objective`` is the slope of its gradient."""
    leaves = {name: value.detach().requires_grad_() for name, value in at.items()}
    grads = autograd_gradient(objective, leaves, create_graph=True)

    def derivative_along(direction: Params) -> Tensor:
        with torch.enable_grad():
            dot = directional_derivative(grads)(direction)
        if not dot.requires_grad:
            return flatten({name: torch.zeros_like(value) for name, value in at.items()})
        tensors = [*leaves.values()]
        kept = torch.autograd.grad(dot, tensors, retain_graph=True, allow_unused=True, materialize_grads=True)
        return flatten(dict(zip(leaves, kept, strict=True)))

    return check_derivative(
        lambda at: flatten(autograd_gradient(objective, at)),
        derivative_along,
        at,
        PRECISIONS[next(iter(at.values())).dtype],
    )


def autograd_gradient(objective: Callable[[Params], Tensor], at: Params, *, create_graph: bool = False) -> Params:
    """Return autograd's gradient, zeros where nothing depends; with ``create_graph`` it can be differentiated."""
    with torch.enable_grad():
        if not create_graph:
            at = {name: value.detach().requires_grad_() for name, value in at.items()}
        loss = objective(at)
        if not loss.requires_grad:
            return {name: torch.zeros_like(value) for name, value in at.items()}
        tensors = [*at.values()]
        grads = torch.autograd.grad(loss, tensors, create_graph=create_graph, allow_unused=True, materialize_grads=True)
    return dict(zip(at, grads, strict=True))


def flatten(params: Params) -> Tensor:
    """Return all entries in one vector."""
    return torch.cat([value.flatten() for value in params.values()])


def find_wrong_layer(trace: LayerTrace, verdict: Callable[[Callable[[Params], Tensor], Params], Verdict]) -> str | None:
    """Return the name of the innermost layer of which ``verdict`` is "wrong", or which fails; None for no layer."""
    tried = set()
    for call in trace.calls:  # A layer's own layers end before it does.
        if call.name in tried:
            continue
        tried.add(call.name)
        objective, at = _isolate_call(call)
        if not at:
            continue
        try:
            if verdict(objective, at) == "wrong":
                return call.name
        except Exception:  # What failed in the whole model fails here.
            return call.name
    return None


def _isolate_call(call: LayerCall) -> tuple[Callable[[Params], Tensor], Params]:
    """Return a layer's call as a scalar function of its weights and floating inputs, and where it was called."""
    leaves, structure = tree_flatten((call.args, call.kwargs))
    inputs = {
        f"input {i}": leaf for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.is_floating_point()
    }
    weights = {f"weight {name}": value for name, value in call.parameters.items() if value.is_floating_point()}

    def objective(at: Params) -> Tensor:
        state = {name: at.get(f"weight {name}", value) for name, value in call.parameters.items()}
        args, kwargs = tree_unflatten([at.get(f"input {i}", leaf) for i, leaf in enumerate(leaves)], structure)
        torch.manual_seed(0)
        result: Any = functional_call(call.layer, {**call.buffers, **state}, args, kwargs)
        outputs = [leaf for leaf in tree_flatten(result)[0] if isinstance(leaf, Tensor) and leaf.is_floating_point()]
        random = torch.Generator().manual_seed(1)
        shares = [torch.randn(one.shape, generator=random, dtype=torch.float64).to(one) for one in outputs]
        return torch.stack([(one * share).sum() for one, share in zip(outputs, shares, strict=True)]).sum()

    return objective, {**weights, **inputs}
