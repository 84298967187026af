"""An ``nn.Module`` as pure functions of its parameters; the module itself is never changed."""

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
    """Return ``output`` computed in ``dtype``, such as bfloat16: parameters and x are cast on the way in.

    The result has the parameters' own precision again, and so have all gradients: the inner loop, which adds small
    steps to large weights, goes on in float32. Integers stay what they are.
    """

    def cast(params: Params, x: Tensor) -> Tensor:
        own = next((value.dtype for value in params.values() if value.is_floating_point()), torch.float32)
        low = {name: value.to(dtype) if value.is_floating_point() else value for name, value in params.items()}
        return output(low, x.to(dtype) if x.is_floating_point() else x).to(own)

    return cast


Criterion = Callable[[Tensor, Tensor], Tensor]


LOSSES: dict[str, Criterion] = {"cross_entropy": F.cross_entropy, "mse": F.mse_loss}
"""The losses that have a name; each takes (output, y) and returns the mean over the batch."""


def model_output(module: nn.Module, *, recompute: Sequence[str] = (), random: bool = False) -> OutputFn:
    """Return ``module`` as a pure function (params, x) -> output.

    The function holds a skeleton on the meta device, so no learned weight is kept twice; buffers, and weights that
    are frozen (``requires_grad`` is false), are kept as they are now and need not be given. Weights that are tied in
    ``module`` go by the name under which ``named_parameters`` gives them. Attention runs by torch's math kernel, the
    only one that can be differentiated twice. Layers that the globs ``recompute`` match are computed again going back,
    see ``activation_checkpoint``; ``random`` says that they may draw numbers. Raises ``ValueError`` for a glob that
    matches nothing; the function does when ``params`` lacks one of those names or has one unknown to the module, for
    torch itself would compute on with uninitialised memory.
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
    """A skeleton for each thread: ``functional_call`` puts the parameters in force into the module itself."""

    def __init__(self, skeleton: nn.Module, recompute: Sequence[str], random: bool) -> None:
        """Copy ``skeleton``, in each thread that asks for it, but for its tensors, which nobody computes with."""
        shared: dict[int, Any] = {id(tensor): tensor for tensor in (*skeleton.parameters(), *skeleton.buffers())}
        self.skeleton = copy.deepcopy(skeleton, shared)
        recompute_blocks(self.skeleton, recompute, random=random)


def _constants(module: nn.Module) -> Params:
    """Return copies of the buffers and of the weights that are not learned."""
    named = {**dict(module.named_buffers()), **{n: w for n, w in module.named_parameters() if not w.requires_grad}}
    return {name: value.detach().clone() for name, value in named.items()}


def _like(buffer: Tensor, x: Tensor, params: Params) -> Tensor:
    """Put a buffer where ``x`` is; a floating one takes the parameters' precision, as ``Module.to`` would see to."""
    some = next((value for value in params.values() if value.is_floating_point()), None)
    return buffer.to(x.device, some.dtype if some is not None and buffer.is_floating_point() else buffer.dtype)


def _skeleton(module: nn.Module) -> nn.Module:
    """Return a copy without memory; unlike ``Module.to("meta")`` it keeps tied weights tied."""
    tensors: dict[int, Any] = {id(p): nn.Parameter(p.to("meta"), p.requires_grad) for p in module.parameters()}
    tensors |= {id(b): b.to("meta") for b in module.buffers()}
    skeleton = copy.deepcopy(module, tensors)
    use_fast_double_backward(skeleton)
    return skeleton


@dataclass(frozen=True)
class ModelLoss:
    """A ``LossFn`` that also gives the model's ``output``; equation: criterion(model(params, x), y).

    ``training`` is the model as it learns, in its module's own mode. A model that is ``random`` there (dropout)
    is seeded by the inner loop, and judged by ``output``, the model in evaluation mode; elsewhere the two are one.
    ``frozen`` are the names of weights that it holds itself, in ``constant_bytes`` together with its buffers;
    ``without_recompute`` is the same loss without recomputation, if there is one; layer checks use it.
    """

    output: OutputFn
    criterion: Criterion
    training: OutputFn
    random: bool = False
    frozen: frozenset[str] = frozenset()
    constant_bytes: int = 0
    without_recompute: "ModelLoss | None" = None

    def __call__(self, params: Params, batch: Batch) -> Tensor:
        """The scalar loss of ``batch`` under ``params``, as the model learns."""
        return self.criterion(self.training(params, batch.x), batch.y)

    def evaluate(self, params: Params, batch: Batch) -> Tensor:
        """The scalar loss of ``batch`` under ``params``, as the model answers: without dropout."""
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

    ``loss`` is a name of ``LOSSES`` or any callable (output, y) -> scalar tensor. ``random`` says whether the module
    draws random numbers as it learns; left out, dropout layers in training mode are looked for, which does
    not find calls of ``F.dropout`` and the like. ``recompute`` holds globs of the layers, ("body.*",) say, that are
    computed again going back instead of being kept. Weights that do not require a gradient are not learned: the loss
    holds copies. With a ``precision``, such as ``torch.bfloat16``, the model computes in it; parameters, gradients and
    the loss keep their own. Raises ``ValueError`` for an unknown name and a glob that matches nothing.
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
    """Return whether a layer of torch draws random numbers: dropout of its own, or inside attention or a recurrence."""
    share = getattr(layer, "dropout", 0.0)  # of MultiheadAttention and RNNs a number, of transformer layers a module
    own = layer.p if isinstance(layer, nn.modules.dropout._DropoutNd) else share
    return layer.training and isinstance(own, float | int) and own > 0


def evaluation_loss(loss: LossFn) -> LossFn:
    """Return the loss that scores are made of: without dropout, where ``loss`` tells the two apart."""
    evaluate: LossFn = getattr(loss, "evaluate", loss)
    return evaluate


def accuracy_of(output: OutputFn) -> AccuracyFn:
    """Return the share of a batch whose largest output is its label (y: integer classes, shape (n,))."""

    def accuracy(params: Params, batch: Batch) -> Tensor:
        return (output(params, batch.x).argmax(-1) == batch.y).to(torch.float64).mean()

    return accuracy


__all__ = ["LOSSES", "LossFn", "ModelLoss", "accuracy_of", "evaluation_loss", "model_loss", "model_output"]
