"""Compare autograd's first and second derivatives with central differences, and find the layer that is wrong."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from statistics import median
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.func import functional_call
from torch.utils._pytree import tree_flatten, tree_unflatten

from online_meta.functional.intent import Intent
from online_meta.preflight.layer_trace import LayerCall, LayerTrace, cut_layers
from online_meta.types import Params

Verdict = Literal["right", "wrong", "unclear"]

NO_INTENT = Intent()


DIRECTIONS = 3


class Precision(NamedTuple):
    """Pairs of ``step_sizes`` for central differences, and the ``tolerance``, a relative error of the norm."""

    step_sizes: tuple[tuple[float, float], ...]
    tolerance: float


PRECISIONS = {
    torch.float64: Precision(((1e-6, 3e-7), (1e-7, 3e-8), (1e-8, 3e-9)), 1e-4),
    torch.float32: Precision(((2e-2, 1e-2), (2e-3, 1e-3)), 5e-2),
}
"""The dtypes that are checked; in lower precision, differences are too inaccurate."""


def check_derivative(
    value: Callable[[Params], Tensor], derivative_along: Callable[[Params], Tensor], at: Params, precision: Precision
) -> Verdict:
    """Check that ``derivative_along(v)`` is d value(at + t v) / dt for random v and a ``value`` of any shape.

    A direction counts as wrong if the differences at both step sizes agree with each other, but not with
    ``derivative_along``. They disagree with each other at a kink (of ReLU or a maximum) or if the precision is too low;
    such a direction does not count. The verdict is "wrong" if most directions are wrong, and "unclear" if none is right
    either. Unless it is "right", the next pair of step sizes is tried: a wrong derivative is wrong at all step sizes,
    while many kinks can bias the differences at one pair.
    """
    verdict: Verdict = "unclear"
    for step_sizes in precision.step_sizes:
        found = _check_at_steps(value, derivative_along, at, step_sizes, precision.tolerance)
        if found == "right":
            return found
        verdict = "wrong" if "wrong" in (found, verdict) else "unclear"
    return verdict


def _check_at_steps(
    value: Callable[[Params], Tensor],
    derivative_along: Callable[[Params], Tensor],
    at: Params,
    step_sizes: tuple[float, float],
    tolerance: float,
) -> Verdict:
    found = [_compare(value, derivative_along, at, step_sizes, seed) for seed in range(DIRECTIONS)]
    scale = median(max(one.derivative, one.difference) for one in found)
    here = value(at)
    rounding = max(1e3 * torch.finfo(here.dtype).eps * float(here.norm()) / min(step_sizes), 1e-300)
    allowed = max(tolerance * scale, rounding)
    steady = [one for one in found if one.disagreement <= allowed]
    wrong = sum(one.error > allowed for one in steady)
    if wrong > DIRECTIONS // 2:
        return "wrong"
    return "right" if len(steady) - wrong >= max(wrong, 1) else "unclear"


def directional_derivative(gradient: Params) -> Callable[[Params], Tensor]:
    """Return v -> the real part of <gradient, v>, the derivative along v of a real function, of complex weights too."""
    return lambda v: torch.stack([(gradient[name].conj() * v[name]).real.sum() for name in gradient]).sum()


class _Comparison(NamedTuple):
    derivative: float
    difference: float
    error: float
    disagreement: float


def _compare(
    value: Callable[[Params], Tensor],
    derivative_along: Callable[[Params], Tensor],
    at: Params,
    step_sizes: tuple[float, float],
    seed: int,
) -> _Comparison:
    random = torch.Generator().manual_seed(seed)
    direction = {name: _draw_like(tensor, random) for name, tensor in at.items()}

    def difference(width: float) -> Tensor:
        ahead = value({name: tensor + width * direction[name] for name, tensor in at.items()})
        behind = value({name: tensor - width * direction[name] for name, tensor in at.items()})
        return (ahead - behind) / (2 * width)

    derivative = derivative_along(direction)
    wide, narrow = (difference(width) for width in step_sizes)
    return _Comparison(*(float(tensor.norm()) for tensor in (derivative, narrow, derivative - narrow, wide - narrow)))


def precision_of(dtypes: Iterable[torch.dtype]) -> Precision | None:
    """Return the precision of the coarsest of the floating-point ``dtypes``; None if it is too coarse to compare."""
    inexact = [dtype.to_real() for dtype in dtypes if dtype.is_floating_point or dtype.is_complex]
    coarsest = max(inexact, key=lambda dtype: torch.finfo(dtype).eps, default=torch.float64)
    return PRECISIONS.get(coarsest)


def _precision_at(at: Params) -> Precision:
    precision = precision_of(value.dtype for value in at.values())
    if precision is None:
        raise TypeError("these tensors are too coarse for derivatives to be compared with differences")
    return precision


def _draw_like(tensor: Tensor, random: torch.Generator) -> Tensor:
    dtype = torch.complex128 if tensor.is_complex() else torch.float64
    return torch.randn(tensor.shape, generator=random, dtype=dtype).to(tensor)


def check_gradient(objective: Callable[[Params], Tensor], at: Params) -> Verdict:
    """Check autograd's gradient of ``objective`` against central differences."""
    found = autograd_gradient(objective, at)
    with torch.no_grad():
        return check_derivative(objective, directional_derivative(found), at, _precision_at(at))


def check_second_derivative(objective: Callable[[Params], Tensor], at: Params) -> Verdict:
    """Check autograd's second derivative of ``objective`` against central differences of its gradient."""
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
        _precision_at(at),
    )


def autograd_gradient(objective: Callable[[Params], Tensor], at: Params, *, create_graph: bool = False) -> Params:
    """Return autograd's gradient, zeros for unused parameters; with ``create_graph`` it can be differentiated again."""
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
    """Concatenate all entries into one vector."""
    return torch.cat([value.flatten() for value in params.values()])


Objective = Callable[[Params], Tensor]


def hold_rows(objective: Objective, rows: Mapping[str, Sequence[int]], base: Params) -> Objective:
    """Return ``objective`` as a function in which some rows of some parameters stay those of ``base``."""
    held = {name: chosen for name, chosen in rows.items() if name in base}
    if not held:
        return objective
    masks = {name: torch.zeros(len(base[name]), dtype=torch.bool) for name in held}
    for name, chosen in held.items():
        masks[name][[*chosen]] = True
        masks[name] = masks[name].to(base[name].device).view(-1, *[1] * (base[name].dim() - 1))
    return lambda at: objective(
        {name: torch.where(masks[name], base[name], v) if name in masks else v for name, v in at.items()}
    )


def cut_out(objective: Objective, at: Params, is_cut: Callable[[str], bool]) -> tuple[list[Objective], Params]:
    """Cut ``objective`` at layers: return the functions that it is made of without them, and their arguments.

    A layer's outputs become arguments, in addition to ``at``, and its inputs become values (in a random projection). So
    the derivatives of everything around these layers can be checked, at any order, and those of the layers play no
    part. Without such a layer, return ``objective`` and ``at``.
    """
    with torch.no_grad(), cut_layers(is_cut) as first:
        objective(at)
    if not first.outputs:
        return [objective], at
    places = [f"output {i}" for i in range(len(first.outputs))]

    def run(at: Params) -> tuple[Tensor, list[Tensor]]:
        with cut_layers(is_cut, [at[place] for place in places]) as cut:
            return objective({name: value for name, value in at.items() if name not in places}), cut.inputs

    def project_inputs(at: Params) -> Tensor:
        return _project(run(at)[1])

    functions: list[Objective] = [lambda at: run(at)[0]]
    return functions + [project_inputs] * bool(first.inputs), {**at, **dict(zip(places, first.outputs, strict=True))}


def _project(tensors: Sequence[Tensor]) -> Tensor:
    """Return a scalar: the tensors in a random projection that is always the same."""
    random = torch.Generator().manual_seed(1)
    shares = [torch.randn(one.shape, generator=random, dtype=torch.float64).to(one) for one in tensors]
    return torch.stack([(one * share).sum() for one, share in zip(tensors, shares, strict=True)]).sum()


def find_wrong_layer(
    trace: LayerTrace, verdict: Callable[[Objective, Params], Verdict], intent: Intent = NO_INTENT
) -> str | None:
    """Return the name of the innermost layer that fails or whose ``verdict`` is "wrong"; None if there is none.

    Declared surrogates count as right, also within other layers.
    """
    tried = set()
    for call in trace.calls:  # The calls of sublayers end before that of their parent.
        if call.name in tried or intent.is_surrogate(call.name):
            continue
        tried.add(call.name)
        objective, at = isolate_call(call, intent)
        if not at:
            continue
        try:
            parts, at = cut_out(objective, at, partial(_is_surrogate_within, intent, call.name))
            if any(verdict(part, at) == "wrong" for part in parts):
                return call.name
        except Exception:  # An operation that fails in the whole model fails in its layer.
            return call.name
    return None


def _is_surrogate_within(intent: Intent, layer: str, name: str) -> bool:
    """Return whether the layer ``name`` of the layer ``layer`` is a surrogate; the empty name is ``layer`` itself."""
    return bool(name) and intent.is_surrogate(f"{layer}.{name}" if layer else name)


def isolate_call(call: LayerCall, intent: Intent = NO_INTENT) -> tuple[Objective, Params]:
    """Return a layer's call as a scalar function of its weights and floating-point inputs, and their values.

    Rows of its weights that are constants stay as they are.
    """
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
        # The square depends on the output at second order, too, as a loss does.
        return _project([output + output.square() / 2 for output in outputs])

    at = {**weights, **inputs}
    within = f"{call.name}." if call.name else ""
    rows = {
        f"weight {name.removeprefix(within)}": rows for name, rows in intent.rows.items() if name.startswith(within)
    }
    return hold_rows(objective, rows, at), at
