"""Turn an ``nn.Module`` into pure functions of its parameters; the module itself is never changed."""

import copy
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from online_meta.functional.activation_checkpoint import recompute_blocks
from online_meta.functional.double_backward import math_attention, use_fast_double_backward
from online_meta.memory import bytes_of
from online_meta.registry import nearest
from online_meta.types import AccuracyFn, Batch, LossFn, OutputFn, Params


def in_precision(output: OutputFn, dtype: torch.dtype) -> OutputFn:
    """Return ``output`` computed in ``dtype``, e.g. bfloat16: floating-point parameters and x are cast first.

    The result is cast back to the parameters' dtype, and gradients have that dtype too, so the inner loop, which adds
    small steps to large weights, stays in float32.
    """

    def cast(params: Params, x: Tensor) -> Tensor:
        own = next((value.dtype for value in params.values() if value.is_floating_point()), torch.float32)
        low = {name: value.to(dtype) if value.is_floating_point() else value for name, value in params.items()}
        return output(low, x.to(dtype) if x.is_floating_point() else x).to(own)

    return cast


Criterion = Callable[[Tensor, Tensor], Tensor]


LOSSES: dict[str, Criterion] = {"cross_entropy": F.cross_entropy, "mse": F.mse_loss}
"""The losses by name; each takes (output, y) and returns the mean over the batch."""


def model_output(module: nn.Module, *, recompute: Sequence[str] = (), random: bool = False) -> OutputFn:
    """Return ``module`` as a pure function (params, x) -> output.

    The function holds a skeleton of the module on the meta device, so it stores no learned weight. It copies buffers
    and frozen weights (``requires_grad`` is false) now; they need not be passed. Tied weights use the name that
    ``named_parameters`` lists. Attention uses torch's math kernel, the only one that can be differentiated twice.

    Args:
        module: the model; it takes one tensor and returns one.
        recompute: globs of layer names whose activations are recomputed in the backward pass.
        random: whether these layers may draw random numbers.

    Returns:
        A function of parameters by name and x of shape (n, ...). It raises ``ValueError`` for a missing or unknown
        parameter name; torch itself would compute with uninitialised memory.

    Raises:
        ValueError: if a glob matches no layer.
    """
    return _output(module, _skeleton(module), _constants(module), recompute, random)


def _output(
    module: nn.Module, skeleton: nn.Module, constants: Params, recompute: Sequence[str], random: bool
) -> OutputFn:
    needed = frozenset(name for name, weight in module.named_parameters() if weight.requires_grad)
    known = frozenset(name for name, _ in module.named_parameters(remove_duplicate=False))
    own = _SkeletonPerThread(skeleton, recompute, random)

    def output(params: Params, x: Tensor) -> Tensor:
        if not needed <= params.keys() <= known:
            lacks, unknown = sorted(needed - params.keys()), sorted(params.keys() - known)
            raise ValueError(f"these are not the model's parameters: {lacks} are missing, {unknown} are unknown")
        here = {name: _like(value, x, params) for name, value in constants.items()}
        with math_attention():
            result: Tensor = functional_call(own.skeleton, {**here, **params}, (x,))
        return result

    return output


class _SkeletonPerThread(threading.local):
    """One skeleton per thread, because ``functional_call`` writes the parameters into the module while it runs."""

    def __init__(self, skeleton: nn.Module, recompute: Sequence[str], random: bool) -> None:
        """Copy ``skeleton`` in each thread that uses it; the copies share the (empty) tensors."""
        shared: dict[int, Any] = {id(tensor): tensor for tensor in (*skeleton.parameters(), *skeleton.buffers())}
        self.skeleton = copy.deepcopy(skeleton, shared)
        recompute_blocks(self.skeleton, recompute, random=random)


def _constants(module: nn.Module) -> Params:
    """Return copies of the buffers and of the frozen weights, by name."""
    named = {**dict(module.named_buffers()), **{n: w for n, w in module.named_parameters() if not w.requires_grad}}
    return {name: value.detach().clone() for name, value in named.items()}


def _like(buffer: Tensor, x: Tensor, params: Params) -> Tensor:
    """Move a buffer to the device of ``x``; cast a floating-point one to the parameters' dtype like ``Module.to``."""
    some = next((value for value in params.values() if value.is_floating_point()), None)
    return buffer.to(x.device, some.dtype if some is not None and buffer.is_floating_point() else buffer.dtype)


def _skeleton(module: nn.Module) -> nn.Module:
    """Return a copy on the meta device; unlike ``Module.to("meta")``, it keeps tied weights tied."""
    tensors: dict[int, Any] = {id(p): nn.Parameter(p.to("meta"), p.requires_grad) for p in module.parameters()}
    tensors |= {id(b): b.to("meta") for b in module.buffers()}
    skeleton = copy.deepcopy(module, tensors)
    use_fast_double_backward(skeleton)
    return skeleton


@dataclass(frozen=True)
class ModelLoss:
    """A ``LossFn`` criterion(model(params, x), y) that also provides the model's ``output``.

    Attributes:
        output: the model in evaluation mode; scores and predictions use it.
        criterion: the loss of (output, y), a scalar.
        training: the model in its module's own mode, used to learn; the same as ``output`` unless ``random``.
        random: whether ``training`` draws random numbers (dropout); the inner loop then seeds them.
        frozen: names of the weights that are not learned, of which the loss holds copies.
        constant_bytes: memory of the frozen weights and buffers, in bytes.
        without_recompute: the same loss without recomputation, for layer checks; None if nothing is recomputed.
    """

    output: OutputFn
    criterion: Criterion
    training: OutputFn
    random: bool = False
    frozen: frozenset[str] = frozenset()
    constant_bytes: int = 0
    without_recompute: "ModelLoss | None" = None

    def __call__(self, params: Params, batch: Batch) -> Tensor:
        """Return the scalar loss of ``batch`` under ``params`` in training mode."""
        return self.criterion(self.training(params, batch.x), batch.y)

    def evaluate(self, params: Params, batch: Batch) -> Tensor:
        """Return the scalar loss of ``batch`` under ``params`` in evaluation mode, without dropout."""
        return self.criterion(self.output(params, batch.x), batch.y)


def model_loss(
    module: nn.Module,
    loss: str | Criterion,
    *,
    random: bool | None = None,
    recompute: Sequence[str] = (),
    precision: torch.dtype | None = None,
) -> ModelLoss:
    """Return the loss of ``module`` as a pure function of its parameters (a ``LossFn``).

    Weights with ``requires_grad`` false are not learned; the loss holds copies of them.

    Args:
        module: the model; it takes one tensor and returns one.
        loss: a name in ``LOSSES``, or a callable (output, y) -> scalar tensor.
        random: whether the module draws random numbers in training; None to look for dropout layers in training mode,
            which does not find calls of ``F.dropout``.
        recompute: globs of layer names, e.g. ("body.*",), whose activations are recomputed in the backward pass.
        precision: the dtype the model computes in, e.g. ``torch.bfloat16``; None for the parameters' own. Parameters,
            gradients and the loss keep their dtype.

    Returns:
        The loss.

    Raises:
        ValueError: if a loss name is unknown or a glob matches no layer.
    """
    if isinstance(loss, str):
        if loss not in LOSSES:
            raise ValueError(f"no loss is called {loss!r}: {nearest(loss, LOSSES)}")
        loss = LOSSES[loss]
    if random is None:
        random = any(_has_dropout(layer) for layer in module.modules())
    constants = _constants(module)
    frozen = frozenset(name for name, weight in module.named_parameters() if not weight.requires_grad)

    def build(criterion: Criterion, again: Sequence[str], without_recompute: ModelLoss | None) -> ModelLoss:
        training = _output(module, _skeleton(module), constants, again, random)
        output = _output(module, _skeleton(module).eval(), constants, again, False) if random else training
        if precision is not None:
            training, output = in_precision(training, precision), in_precision(output, precision)
        return ModelLoss(output, criterion, training, random, frozen, bytes_of(constants), without_recompute)

    return build(loss, recompute, build(loss, (), None) if recompute else None)


def _has_dropout(layer: nn.Module) -> bool:
    """Return whether a torch layer is dropout, or contains it as attention and recurrent layers do."""
    share = getattr(layer, "dropout", 0.0)  # a number in MultiheadAttention and RNNs, a module in transformer layers
    own = layer.p if isinstance(layer, nn.modules.dropout._DropoutNd) else share
    return layer.training and isinstance(own, float | int) and own > 0


def evaluation_loss(loss: LossFn) -> LossFn:
    """Return the loss to score with: ``loss.evaluate``, without dropout, if it exists; otherwise ``loss`` itself."""
    evaluate: LossFn = getattr(loss, "evaluate", loss)
    return evaluate


def accuracy_of(output: OutputFn) -> AccuracyFn:
    """Return a function (params, batch) -> classification accuracy, a float64 scalar in [0, 1].

    The predicted class is the index of the largest value of ``output(params, x)``, of shape (n, classes); the batch's y
    holds integer classes, shape (n,).
    """

    def accuracy(params: Params, batch: Batch) -> Tensor:
        return (output(params, batch.x).argmax(-1) == batch.y).to(torch.float64).mean()

    return accuracy


__all__ = ["LOSSES", "LossFn", "ModelLoss", "accuracy_of", "evaluation_loss", "model_loss", "model_output"]
