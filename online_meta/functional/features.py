"""The features of a model, which are the input of its head, and heads that are made of a support set in closed form.

The head is the ``nn.Linear`` layer whose output is the model's output.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from online_meta.batches import count_samples, only_tensor
from online_meta.functional.calling import take_output
from online_meta.functional.classes import IGNORED_CLASS
from online_meta.functional.stateless import ModuleTensors, SkeletonPerThread
from online_meta.types import Batch, HeadSamples, HeadSolver, LinearHead, LossFn, Params, TargetKind, Tensors

KINDS: dict[str, TargetKind] = {
    "online_meta.outcomes._classes": "classes",
    "online_meta.outcomes.bernoulli": "labels",
    "online_meta.outcomes.mse": "numbers",
    "online_meta.outcomes.gaussian_of_noise": "numbers",
}
"""The kinds of targets, by the modules that define the likelihoods of outcomes."""

OUTCOMES = "cross_entropy, categorical, bernoulli, mse, gaussian_of_noise"
"""The outcomes of these kinds."""

NEEDED = (
    "the model needs a head: a torch.nn.Linear layer with learned weights of its own that is called last and once, and "
    "whose output the model returns as it is"
)


class HeadInput:
    """Calls a skeleton of a model, and returns what its head is given, under the head's name."""

    def __init__(self, skeleton: SkeletonPerThread, tensors: ModuleTensors, output: str = "") -> None:
        """Take a skeleton, which nothing else calls, what was captured of the model, and where its output is."""
        self._skeleton, self._tensors, self._output = skeleton, tensors, output

    def __call__(self, state: Params, x: Tensors) -> Tensors:
        """Return {name of the head: its input for x}; raise ``ValueError`` if the model has no head."""
        calls: list[tuple[nn.Module, Any, Any]] = []
        layers = {layer: name for name, layer in self._skeleton.skeleton.named_modules() if _is_linear(layer)}
        hooks = [layer.register_forward_hook(_note(calls), with_kwargs=True) for layer in layers]
        try:
            output = take_output(self._skeleton(state, x), self._output)
        finally:
            for hook in hooks:
                hook.remove()
        heads = [(layer, given) for layer, given, made in calls if made is output]
        if not heads:
            raise ValueError(f"the output of the model is not that of a linear layer: {NEEDED}")
        ((head, features),) = heads[-1:]
        self._check(layers[head], sum(layer is head for layer, _, _ in calls))
        return {layers[head]: features}

    def _check(self, name: str, calls: int) -> None:
        learned, aliases = self._tensors.learned, self._tensors.aliases
        tied = {*aliases, *aliases.values()}
        for part in ("weight", "bias"):
            if f"{_prefix(name)}{part}" in tied:
                raise ValueError(f"the {part} of the last linear layer {name!r} is tied to another one: {NEEDED}")
        if f"{_prefix(name)}weight" not in learned:
            raise ValueError(f"the weight of the last linear layer {name!r} is frozen, or made of others: {NEEDED}")
        if calls > 1:
            raise ValueError(f"the last linear layer {name!r} is called {calls} times: {NEEDED}")


def _is_linear(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Linear) and type(layer).forward is nn.Linear.forward


def _note(calls: list[tuple[nn.Module, Any, Any]]) -> Any:
    def note(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        calls.append((layer, args[0] if args else kwargs["input"], output))

    return note


def _prefix(name: str) -> str:
    return f"{name}." if name else ""


class Features(NamedTuple):
    """The ``values`` (n, d) that the head is given, and the ``prefix`` of the head's names, such as "head."."""

    prefix: str
    values: Tensor


def compute_features(loss: LossFn, params: Params, x: Tensors) -> Features:
    """Return the input of the model's head for ``x`` under ``params``, in evaluation mode.

    It is a pure function, which ``torch.func`` may transform.

    Args:
        loss: made by ``om.model_loss``.
        params: all learned weights of the model, by name.
        x: the inputs, of n samples.

    Raises:
        ValueError: if the loss is no model's, the model has no head, or a row has several outputs of the head.
    """
    features = getattr(loss, "features", None)
    if features is None:
        raise ValueError("features need a loss of om.model_loss, and a model that copy.deepcopy can copy")
    ((name, values),) = features(params, x).items()
    if values.ndim != 2:
        raise ValueError(
            f"the head {name!r} is given inputs of shape {tuple(values.shape)}: one row of features a sample is "
            "needed, (n, d), so images and sequences of classes have no such head"
        )
    return Features(_prefix(name), values)


def find_kind(loss: LossFn) -> TargetKind:
    """Return what the targets of a model's loss are.

    Raises ``ValueError`` for an outcome whose output is not linear in the head's weights in one of the known ways.
    """
    outcome = getattr(loss, "outcome", None)
    kind = KINDS.get(getattr(getattr(outcome, "nll", None), "__module__", ""))
    if kind is None:
        raise ValueError(f"a head in closed form answers {OUTCOMES}, made with om.model_loss, and not this loss")
    return kind


def solve_head(
    loss: LossFn,
    head: HeadSolver,
    rule: Params,
    params: Params,
    support: Batch,
    features: Features | None = None,
) -> Params:
    """Return the weight and the bias of the model's head as ``head`` makes them of the features of a support set.

    Without samples that count, they are those of ``params``; without rows, nothing is returned. The result is
    differentiable in ``rule`` and ``params``.

    Args:
        loss: made by ``om.model_loss``.
        head: makes the head.
        rule: the learned parameters of the head's rule.
        params: all learned weights of the model, by name.
        support: the support set.
        features: those of the support set, where they are known; None to compute them.

    Returns:
        The tensors of the head by their names in ``params``, with their dtypes.

    Raises:
        ValueError: if the model has no head, or the head answers no targets of this kind.
    """
    kind = find_kind(loss)
    if kind not in head.kinds:
        raise ValueError(
            f"this head answers {' and '.join(head.kinds)}, but the targets are {kind}: choose one that answers {kind}"
        )
    if not count_samples(support):  # Some layers refuse an input without rows.
        return {}
    prefix, values = features or compute_features(loss, params, support.x)
    given = LinearHead(params[f"{prefix}weight"], params.get(f"{prefix}bias"))
    samples = _read_samples(values, support, len(given.weight), kind)
    wide = LinearHead(given.weight.double(), None if given.bias is None else given.bias.double())
    counts = (samples.weight > 0).any()
    found = [
        value if made is None or value is None else torch.where(counts, made, value.double()).to(value.dtype)
        for made, value in zip(head.solve(rule, samples, wide), given, strict=True)
    ]
    named = zip((f"{prefix}weight", f"{prefix}bias"), found, strict=True)
    return {name: value for name, value in named if value is not None}


def _read_samples(features: Tensor, support: Batch, outputs: int, kind: TargetKind) -> HeadSamples:
    y = only_tensor(support.y)
    shape = (len(features),) if kind == "classes" and not y.is_floating_point() else (len(features), outputs)
    if y.shape != shape:
        raise ValueError(f"a head of {outputs} outputs needs targets of shape {shape}, not {tuple(y.shape)}")
    weight = features.new_ones(len(features), dtype=torch.float64)
    if support.weight is not None:
        weight = support.weight.to(weight)
    targets = y.double()
    if kind == "classes" and not y.is_floating_point():
        targets = (y[:, None] == torch.arange(outputs, device=y.device)).double()
        weight = weight * (y != IGNORED_CLASS)
    counts = weight[:, None] > 0  # What padding holds may be anything.
    return HeadSamples(torch.where(counts, features.double(), 0.0), torch.where(counts, targets, 0.0), weight, kind)
