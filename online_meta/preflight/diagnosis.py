"""Explain why a model cannot be differentiated as meta-learning requires, and how to fix it."""

from collections.abc import Iterator, Mapping

import torch

from online_meta.functional.guard import REPEATABLE, explain_state
from online_meta.functional.stateless import is_compiled
from online_meta.preflight.layer_trace import LayerTrace

DETACHING_OPERATIONS = {
    "item": ".item()",
    "tolist": ".tolist()",
    "numpy": ".numpy()",
    "__array__": "numpy",
    "__float__": "float()",
    "__int__": "int()",
    "detach": ".detach()",
    "detach_": ".detach_()",
    "data": ".data",
    "_set_grad_enabled": "torch.no_grad()",
}
"""Operations after which autograd sees a constant, and how they are written in code."""

RANDOM_OPERATIONS = frozenset(
    {"rand", "randn", "rand_like", "randn_like", "randint", "randint_like", "randperm", "bernoulli", "bernoulli_"}
    | {"multinomial", "normal", "normal_", "uniform_", "rrelu", "gumbel_softmax", "alpha_dropout"}
    | {"dropout", "dropout_", "dropout1d", "dropout2d", "dropout3d", "feature_alpha_dropout"}
)
"""Operations that draw torch's random numbers."""

CHECKPOINTED = (
    "is computed again while going back (torch.utils.checkpoint), with other weights than those that it was given: "
    "leave checkpointing out of the model, and save memory by om.exact(inner, rematerialise=True)"
)


def explain_wrong_derivative(trace: LayerTrace, name: str | None, order: str) -> str:
    """Explain why the derivative of ``order`` ("gradient" or "second derivative") is wrong, and how to fix it.

    ``name`` is the layer with the wrong derivative, or None if no single layer has one.
    """
    if trace.recomputed or any("None of the inputs have requires_grad" in warning for warning in trace.warnings):
        return f"{trace.describe_layer([*trace.recomputed, name or ''][0])} {CHECKPOINTED}"
    if trace.in_inference:
        return _explain_inference(trace)
    if name is None:
        return (
            f"the {order} of the loss is not its slope (by central differences), though that of each layer is: the "
            "loss itself hides something from autograd (.detach(), .item(), torch.no_grad(), numpy)"
        )
    named = find_weight_norm(trace, name)
    if named:
        return (
            f"{named} is under weight normalisation, of which torch gives a wrong second derivative without an error "
            "(torch._weight_norm); leave it out, normalise the whole tensor (dim=None), or register "
            "g * v / v.norm(dim=..., keepdim=True) with torch.nn.utils.parametrize"
        )
    if "embedding" in trace.operations_by_layer("embedding".__eq__).get(name, ()):
        return (
            f"the {order} of {trace.describe_layer(name)} is not its slope: its forward calls F.embedding, whose "
            "padding_idx makes a row a constant, and whose scale_grad_by_freq scales the gradient; if this is "
            f"intended, declare frozen_rows = {{ WEIGHT = [ROW] }} or {_declaration(name)}"
        )
    ways = sorted(
        DETACHING_OPERATIONS[operation]
        for operation in trace.operations_by_layer(DETACHING_OPERATIONS.__contains__).get(name, ())
    )
    if ways:
        cure = "freeze the weights that are used there (requires_grad_(False))" if ways == ["torch.no_grad()"] else ""
        return (
            f"the {order} of {trace.describe_layer(name)} is not its slope: its forward uses "
            f"{', '.join(ways)}, behind which "
            f"autograd sees a constant; compute with tensors all the way, or, if this is intended, "
            f"{cure or f'declare {_declaration(name)}'}"
        )
    return (
        f"the {order} of {trace.describe_layer(name)} is not its slope (by central differences): "
        "a torch.autograd.Function in "
        "its forward may have a backward that is wrong or cannot be differentiated (once_differentiable), which "
        "torch.autograd.gradgradcheck would find, or values may leave torch on the way; if the gradient is a surrogate "
        f"on purpose, declare {_declaration(name)}"
    )


def _explain_inference(trace: LayerTrace) -> str:
    where = trace.describe_layer(trace.in_inference[0]) if trace.in_inference else "a part of the model"
    return (
        f"{where} runs under torch.inference_mode(), so it has no gradient: leave that mode out of forward, and "
        "freeze the weights that are used there (requires_grad_(False))"
    )


def _declaration(name: str) -> str:
    """Say how to declare a surrogate gradient in the layer ``name``."""
    if name:
        return f"surrogate = [{name!r}] (in [model], or of om.model_loss)"
    return "surrogate = ['NAME'] for it (in [model], or of om.model_loss), in a layer NAME of its own (an nn.Module)"


def find_weight_norm(trace: LayerTrace, name: str) -> str | None:
    """Describe the layer whose weights the layer ``name`` normalises; return None if it does not normalise weights."""
    layer, owner = trace.layers[name], name.partition("parametrizations.")[0].rstrip(".")
    hooks = [type(hook).__name__ for hook in layer._forward_pre_hooks.values()]
    if type(layer).__name__ == "_WeightNorm" or "WeightNorm" in hooks:
        return trace.describe_layer(owner)
    return None


def explain_error(trace: LayerTrace, error: Exception, name: str | None = None) -> str:
    """Explain what an error means and how to fix it; return an unknown error's own message.

    ``name`` is the layer that fails by itself, or None if no single layer does.
    """
    message = str(error)
    if any(map(is_compiled, trace.layers.values())) or "torch.compile" in message:
        return (
            "a part of the model is compiled (torch.compile), and its programs have one derivative only: take the "
            "module before it is compiled; the meta-gradient is compiled as a whole (batching = 'compiled')"
        )
    if trace.recomputed or "device meta" in message or "checkpoint" in message.lower():
        return (
            f"{trace.describe_layer(trace.recomputed[0]) if trace.recomputed else 'a part of the model'} {CHECKPOINTED}"
        )
    if "modified by an inplace operation" in message or "in-place operation" in message:
        where = _list_operations(trace, trace.operations_by_layer(_is_in_place), "does so by")
        return (
            f"a tensor that the gradient needs is edited in place{': ' * bool(where)}{where}; make a new one "
            "(y = y + x, not y += x; no inplace=True)"
        )
    if trace.in_inference or "Inference tensors cannot be saved" in message:
        return _explain_inference(trace)
    if "scaled_dot_product" in message:
        return (
            "attention by torch's default kernel cannot be differentiated twice: make the loss with om.model_loss, or "
            "call the model under torch.nn.attention.sdpa_kernel(SDPBackend.MATH)"
        )
    if "derivative for" in message and "not implemented" in message:
        where = f" in {trace.describe_layer(name)}" if name is not None else ""
        return (
            f"{summarize_error(error)}: an operation{where or ' of the model'} has one derivative only; write it in "
            "plain operations"
        )
    where = f"{trace.describe_layer(name)}: " if name else ""
    return f"the loss cannot be differentiated: {where}{summarize_error(error)}"


def summarize_error(error: Exception) -> str:
    """Return an error's type and message in one line of at most about 200 characters."""
    first = str(error).strip().split("\n")[0]
    return f"{type(error).__name__}: {first if len(first) <= 200 else first[:200] + ' ...'}"


def _is_in_place(operation: str) -> bool:
    """Return whether an operation writes to an existing tensor."""
    inplace = operation.startswith("__i") and operation not in ("__int__", "__index__", "__init__", "__invert__")
    return operation == "__setitem__" or inplace or (operation.endswith("_") and not operation.startswith("_"))


def _list_operations(trace: LayerTrace, operations_by_layer: dict[str, list[str]], verb: str) -> str:
    return " and ".join(
        f"{trace.describe_layer(name)} {verb} {', '.join(operations)}"
        for name, operations in operations_by_layer.items()
    )


def explain_randomness(trace: LayerTrace, repeats: bool) -> str:
    """Explain why two calls gave different losses; ``repeats`` says whether seeding torch makes them equal."""
    where = _list_operations(trace, trace.operations_by_layer(RANDOM_OPERATIONS.__contains__), "draws by")
    if repeats:
        return f"repeated calls give different losses{': ' * bool(where)}{where}; {REPEATABLE}"
    return (
        "repeated calls give different losses, even from the same torch seed: the model uses other random numbers "
        "(numpy's, Python's) or keeps state between calls; make it a function of its weights and its input"
    )


def explain_stateful_layers(trace: LayerTrace) -> Iterator[str]:
    """Yield a sentence for each layer whose class changes tensors of its own, such as running statistics."""
    for name, layer in trace.layers.items():
        found = explain_state(name, layer)
        if found:
            yield found


def explain_unknown_parameters(trace: LayerTrace) -> Iterator[str]:
    """Yield a sentence for each layer that uses parameters which no module has."""
    for layer, shapes in trace.unknown.items():
        yield (
            f"{trace.describe_layer(layer)} uses parameters of shapes {', '.join(map(str, shapes))}, which no module "
            "has, so they are constants: keep layers in attributes or nn.ModuleList, parameters in nn.ParameterList"
        )


def explain_half_precision(learned: Mapping[str, tuple[torch.Size, torch.dtype]]) -> Iterator[str]:
    """Yield a sentence on what is lost if weights are learned in half precision; ``learned`` has their dtypes."""
    half = [name for name, (_, dtype) in learned.items() if dtype in (torch.bfloat16, torch.float16)]
    if half:
        yield (
            f"{', '.join(half)} are learned in half precision, which loses steps below 1/256 (bfloat16) or 1/2048 "
            "(float16) of a weight: learn in float32, and compute in half precision by model_loss(..., precision=...)"
        )
