"""What to say of a model that cannot be differentiated as meta-learning needs it, and what would be right."""

from collections.abc import Iterator

from torch import nn

from online_meta.watch import Watch

NORMS = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)

HIDING = {
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
"""Operations behind which autograd sees a constant, and how they are written."""

DRAWING = frozenset(
    {"rand", "randn", "rand_like", "randn_like", "randint", "randint_like", "randperm", "bernoulli", "bernoulli_"}
    | {"multinomial", "normal", "normal_", "uniform_", "rrelu", "gumbel_softmax", "alpha_dropout"}
    | {"dropout", "dropout_", "dropout1d", "dropout2d", "dropout3d", "feature_alpha_dropout"}
)
"""Operations that draw torch's random numbers."""

CHECKPOINTED = (
    "is computed again while going back (torch.utils.checkpoint), with other weights than those that it was given: "
    "leave checkpointing out of the model, and save memory by om.exact(inner, rematerialise=True)"
)


def explain_wrong(watch: Watch, name: str | None, order: str) -> str:
    """Say why the derivative of that ``order`` ("gradient", "second derivative") is wrong, and what would be right."""
    if watch.again or any("None of the inputs have requires_grad" in warning for warning in watch.warnings):
        return f"{watch.called([*watch.again, name or ''][0])} {CHECKPOINTED}"
    if name is None:
        return (
            f"the {order} of the loss is not its slope (by central differences), though that of each layer is: the "
            "loss itself hides something from autograd (.detach(), .item(), torch.no_grad(), numpy)"
        )
    named = weight_normed(watch, name)
    if named:
        return (
            f"{named} is under weight normalisation, of which torch gives a wrong second derivative without an error "
            "(torch._weight_norm); leave it out, normalise the whole tensor (dim=None), or register "
            "g * v / v.norm(dim=..., keepdim=True) with torch.nn.utils.parametrize"
        )
    ways = sorted(HIDING[operation] for operation in watch.places(HIDING.__contains__).get(name, ()))
    if ways:
        return (
            f"the {order} of {watch.called(name)} is not its slope: its forward uses {', '.join(ways)}, behind which "
            "autograd sees a constant; compute with tensors all the way"
        )
    return (
        f"the {order} of {watch.called(name)} is not its slope (by central differences): a torch.autograd.Function in "
        "its forward may have a backward that is wrong or cannot be differentiated (once_differentiable), which "
        "torch.autograd.gradgradcheck would find, or values may leave torch on the way"
    )


def weight_normed(watch: Watch, name: str) -> str | None:
    """Return how to speak of the layer whose weights the layer ``name`` normalises, None when it does not."""
    layer, owner = watch.layers[name], name.partition("parametrizations.")[0].rstrip(".")
    hooks = [type(hook).__name__ for hook in layer._forward_pre_hooks.values()]
    if type(layer).__name__ == "_WeightNorm" or "WeightNorm" in hooks:
        return watch.called(owner)
    return None


def explain_error(watch: Watch, error: Exception) -> str:
    """Say in plain words what an error means, and what would be right; one that is not known speaks for itself."""
    told = str(error)
    if watch.again or "device meta" in told or "checkpoint" in told.lower():
        return f"{watch.called(watch.again[0]) if watch.again else 'a part of the model'} {CHECKPOINTED}"
    if "modified by an inplace operation" in told or "in-place operation" in told:
        where = _listed(watch, watch.places(_edits), "does so by")
        return (
            f"a tensor that the gradient needs is edited in place{': ' * bool(where)}{where}; make a new one "
            "(y = y + x, not y += x; no inplace=True)"
        )
    if "scaled_dot_product" in told:
        return (
            "attention by torch's default kernel cannot be differentiated twice: make the loss with om.model_loss, or "
            "call the model under torch.nn.attention.sdpa_kernel(SDPBackend.MATH)"
        )
    if "derivative for" in told and "not implemented" in told:
        return f"{summed_up(error)}: an operation of the model has one derivative only; write it in plain operations"
    return f"the loss cannot be differentiated: {summed_up(error)}"


def summed_up(error: Exception) -> str:
    """Return an error in one line."""
    first = str(error).strip().split("\n")[0]
    return f"{type(error).__name__}: {first if len(first) <= 200 else first[:200] + ' ...'}"


def _edits(operation: str) -> bool:
    """Return whether an operation writes to a tensor that was there before."""
    inplace = operation.startswith("__i") and operation not in ("__int__", "__index__", "__init__", "__invert__")
    return operation == "__setitem__" or inplace or (operation.endswith("_") and not operation.startswith("_"))


def _listed(watch: Watch, places: dict[str, list[str]], verb: str) -> str:
    return " and ".join(f"{watch.called(name)} {verb} {', '.join(operations)}" for name, operations in places.items())


def explain_chance(watch: Watch, repeats: bool) -> str:
    """Say why two calls gave different losses; ``repeats`` whether torch's seed makes them the same."""
    where = _listed(watch, watch.places(DRAWING.__contains__), "draws by")
    if repeats:
        return (
            f"the loss is another when it is asked again{': ' * bool(where)}{where}; a round must be repeatable, so "
            "draw in nn.Dropout layers, which are found and seeded, or say model_loss(..., random=True)"
        )
    return (
        "the loss is another when it is asked again, from the same torch seed too: the model uses other random numbers "
        "(numpy's, Python's) or remembers something between calls; make it a function of its weights and its input"
    )


def running_statistics(watch: Watch) -> Iterator[str]:
    """Give a sentence for each layer that learns statistics beside its weights."""
    for name, layer in watch.layers.items():
        if isinstance(layer, NORMS) and layer.track_running_stats and layer.training:
            yield (
                f"{watch.called(name)} keeps running statistics, which a pure function of the weights cannot; build it "
                "with track_running_stats=False, or use GroupNorm"
            )
