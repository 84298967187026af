"""Turn an ``nn.Module`` into pure functions of its parameters; the module itself is never changed."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from online_meta.functional.activation_checkpoint import recompute_blocks
from online_meta.functional.classes import find_right
from online_meta.functional.double_backward import math_attention, use_fast_double_backward
from online_meta.functional.guard import (
    CheckedLoss,
    Criterion,
    LossGuard,
    explain_misfit,
    find_stateful_layers,
)
from online_meta.functional.intent import Intent, declare_intent
from online_meta.functional.stateless import (
    ModuleItself,
    ModuleTensors,
    SkeletonPerThread,
    capture_tensors,
    check_names,
    copy_without_weights,
    place_constants,
)
from online_meta.memory import bytes_of
from online_meta.registry import nearest
from online_meta.types import AccuracyFn, Batch, LossFn, OutputFn, Params


def in_precision(output: OutputFn, dtype: torch.dtype) -> OutputFn:
    """Return ``output`` computed in ``dtype``, e.g. bfloat16: floating-point parameters and x are cast first.

    An x of another dtype than the parameters keeps it. The result is cast back to the parameters' dtype, and gradients
    have that dtype too, so the inner loop, which adds small steps to large weights, stays in float32.
    """

    def cast(params: Params, x: Tensor) -> Tensor:
        own = [value.dtype for value in params.values() if value.is_floating_point()] or [torch.float32]
        low = {name: value.to(dtype) if value.is_floating_point() else value for name, value in params.items()}
        return output(low, x.to(dtype) if x.dtype in own else x).to(own[0])

    return cast


LOSSES: dict[str, Criterion] = {"cross_entropy": F.cross_entropy, "mse": F.mse_loss}
"""The losses by name; each takes (output, y) and returns the mean over the batch."""


def model_output(module: nn.Module, *, recompute: Sequence[str] = (), random: bool = False) -> OutputFn:
    """Return ``module`` as a pure function (params, x) -> output.

    The function holds a skeleton of the module on the meta device, so it stores no learned weight. It copies buffers
    and frozen weights (``requires_grad`` is false) now, in their own dtypes; they need not be passed. Tied weights use
    the name that ``named_parameters`` lists. Attention uses torch's math kernel, the only one that can be
    differentiated twice. A module that cannot be copied (it holds a lock, or a function that refers to it) is called
    itself, by one thread at a time, and is left as it was.

    Args:
        module: the model; it takes one tensor and returns one.
        recompute: globs of layer names whose activations are recomputed in the backward pass.
        random: whether these layers may draw random numbers.

    Returns:
        A function of parameters by name and x of shape (n, ...). It raises ``ValueError`` for a missing or unknown
        parameter name; torch itself would compute with uninitialised memory.

    Raises:
        ValueError: if a glob matches no layer, or if weights of the module have no shape yet.
    """
    return _output(module, capture_tensors(module), recompute, random)


def _output(
    module: nn.Module, tensors: ModuleTensors, recompute: Sequence[str], random: bool, evaluate: bool = False
) -> OutputFn:
    skeleton = copy_without_weights(module)
    if skeleton is None and recompute:
        raise ValueError(
            f"recompute = {[*recompute]} needs a model that can be copied (copy.deepcopy): keep locks, open files and "
            "functions that refer to the model out of its attributes"
        )
    if skeleton is None:
        return _as_output(tensors, ModuleItself(module, evaluate=evaluate))
    skeleton = skeleton.eval() if evaluate else skeleton
    return _as_output(tensors, SkeletonPerThread(skeleton, partial(_prepare, recompute, random)))


def _prepare(recompute: Sequence[str], random: bool, skeleton: nn.Module) -> None:
    use_fast_double_backward(skeleton)
    recompute_blocks(skeleton, recompute, random=random)


def _as_output(tensors: ModuleTensors, own: Callable[[Params, Tensor], Tensor]) -> OutputFn:
    def output(params: Params, x: Tensor) -> Tensor:
        check_names(tensors, params)
        with math_attention():
            return own({**place_constants(tensors, params, x), **params}, x)

    return output


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
        tensors: what was captured of the module; None for a loss that was not made by ``model_loss``.
        guards: refuse what would silently be another loss, in training and in evaluation mode; None for no checks.
        intent: what is declared about the model's gradients.
    """

    output: OutputFn
    criterion: Criterion
    training: OutputFn
    random: bool = False
    frozen: frozenset[str] = frozenset()
    constant_bytes: int = 0
    without_recompute: "ModelLoss | None" = None
    tensors: ModuleTensors | None = field(default=None, compare=False)
    guards: tuple[LossGuard, LossGuard] | None = field(default=None, compare=False)
    intent: Intent = field(default=Intent(), compare=False)

    def __call__(self, params: Params, batch: Batch) -> Tensor:
        """Return the scalar loss of ``batch`` under ``params`` in training mode.

        Raises ``ValueError`` if the module is no function of its weights, or output and targets do not fit the loss.
        """
        if self.guards is not None:
            return self.guards[0].run(self.training, self.criterion, params, batch)
        return self.criterion(self.training(params, batch.x), batch.y)

    def evaluate(self, params: Params, batch: Batch) -> Tensor:
        """Return the scalar loss of ``batch`` under ``params`` in evaluation mode, without dropout."""
        if self.guards is not None:
            return self.guards[1].run(self.output, self.criterion, params, batch)
        return self.criterion(self.output(params, batch.x), batch.y)


def model_loss(
    module: nn.Module,
    loss: str | Criterion,
    *,
    random: bool | None = None,
    recompute: Sequence[str] = (),
    precision: torch.dtype | None = None,
    surrogate: Sequence[str] = (),
    frozen_rows: Mapping[str, Sequence[int]] | None = None,
) -> ModelLoss:
    """Return the loss of ``module`` as a pure function of its parameters (a ``LossFn``).

    Weights with ``requires_grad`` false are not learned; the loss holds copies of them. A call is refused if the module
    keeps running statistics, if the first forward pass edits a tensor, or if output and targets do not fit the loss,
    which is tried for each new shape. Learners also compare the first output with that of the module.

    Args:
        module: the model; it takes one tensor and returns one.
        loss: a name in ``LOSSES``, or a callable (output, y) -> scalar tensor.
        random: whether the module draws random numbers in training; None to look for dropout layers in training mode,
            which does not find calls of ``F.dropout``.
        recompute: globs of layer names, e.g. ("body.*",), whose activations are recomputed in the backward pass.
        precision: the dtype the model computes in, e.g. ``torch.bfloat16``; None for the parameters' own. Parameters,
            gradients and the loss keep their dtype.
        surrogate: globs of the names of layers whose gradient is not their slope on purpose, such as a straight-through
            estimator. ``preflight`` accepts it there, and checks everything around these layers.
        frozen_rows: by name of a weight, rows whose gradient is zero on purpose. ``preflight`` checks that it is zero.
            The ``padding_idx`` of embedding layers is found without it.

    Returns:
        The loss.

    Raises:
        ValueError: if a loss name is unknown or the loss is a class, a glob matches no layer, or a row does not exist.
    """
    criterion = _find_criterion(loss)
    repeatable = random is None
    if random is None:
        random = any(_is_random(layer) for layer in module.modules())
    tensors = capture_tensors(module)
    intent = declare_intent(module, surrogate, frozen_rows or {})
    faults = tuple(find_stateful_layers(module))

    def guard(evaluate: bool) -> LossGuard:
        reference = _reference(module, tensors, evaluate, precision)
        return LossGuard(faults, tensors, reference, repeatable and evaluate == random)

    guards = guard(False), guard(random)

    def build(criterion: Criterion, again: Sequence[str], without_recompute: ModelLoss | None) -> ModelLoss:
        training = _precise(_output(module, tensors, again, random), precision)
        output = _precise(_output(module, tensors, again, False, evaluate=True), precision) if random else training
        size = bytes_of(tensors.constants)
        return ModelLoss(
            output, criterion, training, random, tensors.frozen, size, without_recompute, tensors, guards, intent
        )

    return build(criterion, recompute, build(criterion, (), None) if recompute else None)


def _find_criterion(loss: str | Criterion) -> Criterion:
    """Return the loss of a name, or the given one; raises ``ValueError`` for an unknown name or a class."""
    if isinstance(loss, str):
        if loss not in LOSSES:
            raise ValueError(f"no loss is called {loss!r}: {nearest(loss, LOSSES)}")
        return LOSSES[loss]
    if isinstance(loss, type):
        raise ValueError(f"the loss is the class {loss.__name__}: give a function of (output, y), or an instance")
    return loss


def _precise(output: OutputFn, precision: torch.dtype | None) -> OutputFn:
    return output if precision is None else in_precision(output, precision)


def _reference(module: nn.Module, tensors: ModuleTensors, evaluate: bool, precision: torch.dtype | None) -> OutputFn:
    """Return the module itself as a pure function of its weights, with the tensors that were captured as they are.

    In a ``precision``, those of the learned weights' dtypes are cast like these.
    """
    itself = ModuleItself(module, evaluate=evaluate, keep=False)
    cast = set() if precision is None else {dtype for _, dtype in tensors.learned.values() if dtype.is_floating_point}

    def reference(params: Params, x: Tensor) -> Tensor:
        constants = {n: v.to(precision) if v.dtype in cast else v for n, v in tensors.constants.items()}
        with math_attention():
            return itself({**constants, **params}, x)

    return _precise(reference, precision)


def _is_random(layer: nn.Module) -> bool:
    """Return whether a torch layer draws random numbers, itself or as attention and recurrent layers do."""
    if isinstance(layer, nn.RReLU):
        return layer.training and layer.lower < layer.upper
    share = getattr(layer, "dropout", 0.0)  # a number in MultiheadAttention and RNNs, a module in transformer layers
    own = layer.p if isinstance(layer, nn.modules.dropout._DropoutNd) else share
    return layer.training and isinstance(own, float | int) and own > 0


def checked_loss(loss: LossFn) -> LossFn:
    """Return the loss with checks of its first call: whether it is repeatable and, of a ``ModelLoss``, its module's."""
    if not isinstance(loss, ModelLoss):
        return loss if isinstance(loss, CheckedLoss) else CheckedLoss(loss)
    if loss.guards is None:
        return loss
    training, evaluation = (replace(guard, compares=True, _tried=False) for guard in loss.guards)
    return replace(loss, guards=(training, evaluation))


def find_misfits(loss: LossFn, params: Params, batches: Iterable[Batch]) -> Iterator[str]:
    """Yield a sentence for the first batch whose output and targets do not fit a ``ModelLoss``; none for other losses.

    A batch for which the model raises an error is left out.
    """
    if not isinstance(loss, ModelLoss):
        return
    for batch in batches:
        with suppress(Exception):
            misfit = explain_misfit(loss.criterion, loss.output(params, batch.x), batch.y)
            if misfit:
                yield misfit
                return


def find_unfaithful_outputs(loss: LossFn, params: Params, batches: Iterable[Batch]) -> Iterator[str]:
    """Yield a sentence if the output of a ``ModelLoss`` is not that of its module, in its own dtypes and modes.

    They are compared at ``params`` and at others, because a copy of a module may have kept some of the old ones. An
    input for which the model raises an error is left out. Torch's random generator is seeded.
    """
    if not isinstance(loss, ModelLoss) or loss.guards is None:
        return
    random = torch.Generator().manual_seed(0)
    others = {
        name: value + 0.01 * torch.randn(value.shape, generator=random, dtype=torch.float64).to(value)
        for name, value in params.items()
    }
    inputs = [batch.x for batch in batches]
    for guard, output in zip(loss.guards, (loss.training, loss.output), strict=True):
        for at, x in product((params, others), inputs):
            with suppress(Exception):
                torch.manual_seed(0)
                found = output(at, x)
                torch.manual_seed(0)
                difference = guard.explain_difference(found, at, x)
                if difference:
                    yield difference
                    return


def evaluation_loss(loss: LossFn) -> LossFn:
    """Return the loss to score with: ``loss.evaluate``, without dropout, if it exists; otherwise ``loss`` itself."""
    evaluate: LossFn = getattr(loss, "evaluate", loss)
    return evaluate


def accuracy_of(output: OutputFn, *, dim: int | None = None) -> AccuracyFn:
    """Return a function (params, batch) -> classification accuracy, a float64 scalar in [0, 1].

    The predicted class is the index of the largest value of ``output(params, x)`` over its dimension of classes. The
    batch's y holds integer classes, of the output's shape without that dimension, or probabilities of the output's own
    shape, of which the largest counts. Entries of class -100 do not count, as in ``F.cross_entropy``; without others
    the accuracy is NaN.

    Args:
        output: the model's output.
        dim: the dimension of the classes; None for that of ``F.cross_entropy``, (n, classes, ...), or the last one,
            (n, ..., classes), where only this fits y.

    Returns:
        The function. It raises ``ValueError`` for an output and y of other shapes.
    """

    def accuracy(params: Params, batch: Batch) -> Tensor:
        right, counts = find_right(output(params, batch.x), batch.y, dim)
        return right.to(torch.float64).sum() / counts.sum()

    return accuracy


__all__ = ["LOSSES", "LossFn", "ModelLoss", "accuracy_of", "evaluation_loss", "model_loss", "model_output"]
