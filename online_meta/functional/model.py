"""Turn an ``nn.Module`` into pure functions of its parameters; the module itself is never changed."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from online_meta import outcomes, registry
from online_meta.batches import as_named, count_samples, from_named, map_tensors, select_samples
from online_meta.functional.activation_checkpoint import recompute_blocks, select_blocks
from online_meta.functional.calling import read_arguments, take_output
from online_meta.functional.classes import find_right
from online_meta.functional.double_backward import math_attention, use_fast_double_backward, use_lean_pooling
from online_meta.functional.features import HeadInput
from online_meta.functional.guard import (
    CheckedLoss,
    Criterion,
    LossGuard,
    explain_misfit,
    find_mixing_layers,
    find_stateful_layers,
    is_abstract,
)
from online_meta.functional.intent import Intent, declare_intent
from online_meta.functional.stateless import (
    NOT_KEPT,
    KeptWeights,
    ModuleItself,
    ModuleTensors,
    SkeletonPerThread,
    capture_tensors,
    check_names,
    copy_without_weights,
    place_constants,
)
from online_meta.outcomes import LossFunction
from online_meta.prediction import loss_of, point
from online_meta.types import AccuracyFn, Batch, LossFn, Outcome, OutputFn, Params, Tensors


def in_precision(output: OutputFn, dtype: torch.dtype) -> OutputFn:
    """Return ``output`` computed in ``dtype``, e.g. bfloat16: floating-point parameters and x are cast first.

    An x of another dtype than the parameters keeps it. The result is cast back to the parameters' dtype, and gradients
    have that dtype too, so the inner loop, which adds small steps to large weights, stays in float32.
    """

    def cast(params: Params, x: Tensors) -> Tensors:
        own = [value.dtype for value in params.values() if value.is_floating_point()] or [torch.float32]
        low = {name: value.to(dtype) if value.is_floating_point() else value for name, value in params.items()}
        given = map_tensors(lambda tensor: tensor.to(dtype) if tensor.dtype in own else tensor, x)
        return map_tensors(lambda tensor: tensor.to(own[0]), output(low, given))

    return cast


def model_output(
    module: nn.Module, *, recompute: Sequence[str] = (), random: bool = False, output: str = ""
) -> OutputFn:
    """Return ``module`` as a pure function (params, x) -> output.

    The function holds a skeleton of the module on the meta device, so it stores no learned weight. It copies buffers
    and frozen weights (``requires_grad`` is false) now, in their own dtypes; they need not be passed. Tied weights use
    the name that ``named_parameters`` lists. Attention uses torch's math kernel, the only one that can be
    differentiated twice. A module that cannot be copied (it holds a lock, or a function that refers to it) is called
    itself, by one thread at a time, and is left as it was.

    Args:
        module: the model; it takes a tensor, or named tensors as keywords or as one dict.
        recompute: globs of layer names whose activations are recomputed in the backward pass.
        random: whether these layers may draw random numbers.
        output: the part of what the model returns that is its output, see ``model_loss``.

    Returns:
        A function of parameters by name and x of shape (n, ...). It raises ``ValueError`` for a missing or unknown
        parameter name; torch itself would compute with uninitialised memory.

    Raises:
        ValueError: if a glob matches no layer, or if weights of the module have no shape yet.
    """
    return _output(module, capture_tensors(module), recompute, random, part=output)


def _output(
    module: nn.Module,
    tensors: ModuleTensors,
    recompute: Sequence[str],
    random: bool,
    evaluate: bool = False,
    part: str = "",
) -> OutputFn:
    skeleton = copy_without_weights(module)
    if skeleton is None and recompute:
        raise ValueError(
            f"recompute = {[*recompute]} needs a model that can be copied (copy.deepcopy): keep locks, open files and "
            "functions that refer to the model out of its attributes"
        )
    if skeleton is None:
        return _as_output(tensors, ModuleItself(module, evaluate=evaluate), part)
    skeleton = skeleton.eval() if evaluate else skeleton
    tensors = _defer(tensors, skeleton, recompute)
    prepare = partial(_prepare, recompute, random, tensors)
    return _as_output(tensors, SkeletonPerThread(skeleton, prepare, read_arguments(module)), part)


def _features(
    module: nn.Module,
    tensors: ModuleTensors,
    recompute: Sequence[str],
    evaluate: bool,
    precision: torch.dtype | None,
    part: str,
) -> Callable[[Params, Tensors], Params] | None:
    """Return the input of the head as a pure function of parameters and x; None of a module that is not copied."""
    skeleton = copy_without_weights(module)
    if skeleton is None:
        return None
    skeleton = skeleton.eval() if evaluate else skeleton
    recompute = recompute if tensors.kept.tensors else ()
    tensors = _defer(tensors, skeleton, recompute)
    called = SkeletonPerThread(skeleton, partial(_prepare, recompute, False, tensors), read_arguments(module))
    features: Any = _precise(
        _as_output(tensors, HeadInput(called, tensors, part)), precision
    )  # Its output is a dict of one tensor.
    return features  # type: ignore[no-any-return]


def _defer(tensors: ModuleTensors, skeleton: nn.Module, recompute: Sequence[str]) -> ModuleTensors:
    return tensors.defer(select_blocks(skeleton, recompute)) if tensors.kept.tensors else tensors


def _prepare(recompute: Sequence[str], random: bool, tensors: ModuleTensors, skeleton: nn.Module) -> None:
    use_fast_double_backward(skeleton)
    use_lean_pooling(skeleton)
    names = tensors.deferred
    recompute_blocks(skeleton, recompute, random=random, release=lambda at: tensors.kept.release(names.get(at, ())))


def _as_output(tensors: ModuleTensors, own: Callable[[Params, Tensors], Any], part: str = "") -> OutputFn:
    deferred = {name for names in tensors.deferred.values() for name in names}
    others = [name for name in tensors.kept.tensors if name not in deferred]

    def output(params: Params, x: Tensors) -> Tensors:
        check_names(tensors, params)
        try:
            with math_attention():
                return take_output(own({**place_constants(tensors, params, x), **params}, x), part)
        finally:
            tensors.kept.release(others)

    return output


@dataclass(frozen=True)
class ModelLoss:
    """A ``LossFn`` criterion(model(params, x), y) that also provides the model's ``output`` and its outcome.

    Attributes:
        output: the model in evaluation mode; scores and predictions use it.
        outcome: what the output says about a target.
        training: the model in its module's own mode, used to learn; the same as ``output`` unless ``random``.
        random: whether ``training`` draws random numbers (dropout); the inner loop then seeds them.
        frozen: names of the weights that are not learned, of which the loss holds copies.
        constant_bytes: memory of the frozen weights and buffers, in bytes: of ``kept`` weights that layers of
            ``recompute`` read, those of the largest such layer alone.
        without_recompute: the same loss without recomputation, for layer checks; None if nothing is recomputed.
        tensors: what was captured of the module; None for a loss that was not made by ``model_loss``.
        guards: refuse what would silently be another loss, in training and in evaluation mode; None for no checks.
        intent: what is declared about the model's gradients.
        features: (params, x) -> the input of the model's head in evaluation mode, under the head's name; see
            ``compute_features``. None for a loss that was not made by ``model_loss``, or a model that is not copied.
        masks: the names of inputs that are sequences, each with the name of the input that is its mask.
        mixing: descriptions of the layers of torch's that let the samples of a batch influence each other in training.
    """

    output: OutputFn
    outcome: Outcome
    training: OutputFn
    random: bool = False
    frozen: frozenset[str] = frozenset()
    constant_bytes: int = 0
    without_recompute: "ModelLoss | None" = None
    tensors: ModuleTensors | None = field(default=None, compare=False)
    guards: tuple[LossGuard, LossGuard] | None = field(default=None, compare=False)
    intent: Intent = field(default=Intent(), compare=False)
    features: Callable[[Params, Tensors], Params] | None = field(default=None, compare=False)
    masks: Mapping[str, str] = field(default_factory=dict, compare=False)
    mixing: tuple[str, ...] = ()

    def __call__(self, params: Params, batch: Batch) -> Tensor:
        """Return the scalar loss of ``batch`` under ``params`` in training mode.

        Raises ``ValueError`` if the module is no function of its weights, or output and targets do not fit the loss.
        """
        return self.judge(self.call_training(params, batch.x), batch)

    def call_training(self, params: Params, x: Tensors) -> Tensors:
        """Return the output for ``x`` in training mode. Raises ``ValueError`` if the module is not pure."""
        return _call(None if self.guards is None else self.guards[0], self.training, params, x)

    def judge(self, output: Tensors, batch: Batch) -> Tensor:
        """Return the loss of the ``output`` of training mode. Raises ``ValueError`` if it does not fit the targets."""
        return self._judge(None if self.guards is None else self.guards[0], output, batch)

    def require_separate_samples(self, params: Params, batch: Batch) -> None:
        """Raise ``ValueError`` if the model lets the samples of a batch influence each other; it is asked once.

        Where tensors have no values, as under ``vmap``, nothing is asked.
        """
        guard = None if self.guards is None else self.guards[0]
        if guard is None or guard.separate or is_abstract():
            return
        mixed = explain_mixed_samples(self, params, select_samples(batch, slice(0, 3)))
        if mixed is not None:
            raise ValueError(f"a set of samples cannot be computed in chunks: {mixed}")
        guard.separate = True

    def evaluate(self, params: Params, batch: Batch) -> Tensor:
        """Return the scalar loss of ``batch`` under ``params`` in evaluation mode, without dropout."""
        guard = None if self.guards is None else self.guards[1]
        return self._judge(guard, _call(guard, self.output, params, batch.x), batch)

    @property
    def criterion(self) -> Criterion:
        """The loss of (output, y), a scalar."""
        return partial(mean_nll, self.outcome) if self.outcome.loss is None else self.outcome.loss

    def _judge(self, guard: LossGuard | None, output: Tensors, batch: Batch) -> Tensor:
        if batch.weight is not None:
            return loss_of(point(self.outcome, output), batch.y, batch.weight)
        criterion = self.criterion
        return criterion(output, batch.y) if guard is None else guard.judge(criterion, output, batch.y)

    def answer(self, params: Params, x: Tensors) -> Tensors:
        """Return the output for ``x`` in evaluation mode. Raises ``ValueError`` if it is not that of the module."""
        return _call(None if self.guards is None else self.guards[1], self.output, params, x)

    @cached_property
    def answer_outcome(self) -> Outcome:
        """The outcome of what ``answer`` returns; its loss refuses outputs and targets that do not fit."""
        loss = self.outcome.loss
        if self.guards is None or loss is None:  # The outcomes with nll alone check shapes themselves.
            return self.outcome
        judge = self.guards[1].judge
        if isinstance(loss, LossFunction):
            return self.outcome._replace(loss=replace(loss, function=partial(judge, loss.function)))
        return self.outcome._replace(loss=partial(judge, loss))


def _call(guard: LossGuard | None, output: OutputFn, params: Params, x: Tensors) -> Tensors:
    return output(params, x) if guard is None else guard.call(output, params, x)


def mean_nll(outcome: Outcome, output: Tensors, y: Tensors) -> Tensor:
    """Return the mean negative log-likelihood of the rows, the loss of an outcome without a loss of its own."""
    return outcome.nll(output, y).mean()


def model_loss(
    module: nn.Module,
    loss: str | Criterion,
    *,
    loss_options: Mapping[str, Any] | None = None,
    random: bool | None = None,
    recompute: Sequence[str] = (),
    precision: torch.dtype | None = None,
    surrogate: Sequence[str] = (),
    frozen_rows: Mapping[str, Sequence[int]] | None = None,
    output: str = "",
    kept: KeptWeights = NOT_KEPT,
) -> ModelLoss:
    """Return the loss of ``module`` as a pure function of its parameters (a ``LossFn``).

    Weights with ``requires_grad`` false are not learned; the loss holds copies of them. A call is refused if the module
    keeps running statistics, if the first forward pass edits a tensor, or if output and targets do not fit the loss,
    which is tried for each new shape. Learners also compare the first output with that of the module.

    Args:
        module: the model. It takes a tensor, or named tensors as keywords; a ``forward`` with one argument of another
            name is given them as one dict. It returns a tensor, a dict of tensors, or what ``output`` takes them from.
        loss: the name of one of ``online_meta/outcomes``, or a callable (output, y) -> losses (n,) or their mean.
        loss_options: options of a named outcome, such as the ``sigma`` of "gaussian_of_noise".
        random: whether the module draws random numbers in training; None to look for dropout layers in training mode,
            which does not find calls of ``F.dropout``.
        recompute: globs of layer names, e.g. ("body.*",), whose activations are recomputed in the backward pass.
        precision: the dtype the model computes in, e.g. ``torch.bfloat16``; None for the parameters' own. Parameters,
            gradients and the loss keep their dtype.
        surrogate: globs of the names of layers whose gradient is not their slope on purpose, such as a straight-through
            estimator. ``preflight`` accepts it there, and checks everything around these layers.
        frozen_rows: by name of a weight, rows whose gradient is zero on purpose. ``preflight`` checks that it is zero.
            The ``padding_idx`` of embedding layers is found without it.
        output: the part of what the model returns that is its output, such as "logits": an attribute, a key of a dict
            or an index of a tuple; or several with dots between them, such as "heads.0". "" for the whole.
        kept: frozen weights that are not copied; layers of ``recompute`` place theirs only while they are computed.

    Raises:
        ValueError: if a loss or an option is unknown, a glob matches no layer, or a row does not exist.
    """
    outcome, repeatable = find_outcome(loss, loss_options or {}), random is None
    random = any(map(_is_random, module.modules())) if random is None else random
    tensors, intent = capture_tensors(module, kept), declare_intent(module, surrogate, frozen_rows or {})
    guards = (
        _make_guard(module, tensors, False, precision, output, repeatable and not random),
        _make_guard(module, tensors, random, precision, output, repeatable),
    )
    features = _features(module, tensors, recompute, random, precision, output)
    mixing = tuple(find_mixing_layers(module))

    def build(again: Sequence[str], without_recompute: ModelLoss | None) -> ModelLoss:
        training = _precise(_output(module, tensors, again, random, part=output), precision)
        evaluated = training
        if random:
            evaluated = _precise(_output(module, tensors, again, False, evaluate=True, part=output), precision)
        held = _defer(tensors, module, again).held_bytes
        shared = tensors.frozen, held, without_recompute, tensors, guards, intent, features
        return ModelLoss(evaluated, outcome, training, random, *shared, mixing=mixing)

    return build(recompute, build((), None) if recompute else None)


def _make_guard(
    module: nn.Module,
    tensors: ModuleTensors,
    evaluate: bool,
    precision: torch.dtype | None,
    part: str,
    repeatable: bool,
) -> LossGuard:
    reference = _reference(module, tensors, evaluate, precision, part)
    return LossGuard(tuple(find_stateful_layers(module)), tensors, reference, repeatable)


def find_outcome(loss: str | Criterion, options: Mapping[str, Any]) -> Outcome:
    """Return the outcome of a name or of a loss function; raises ``ValueError`` for an unknown name or a class."""
    if isinstance(loss, str):
        known = registry.names(outcomes)
        if loss not in known:
            raise ValueError(f"no loss is called {loss!r}: {registry.nearest(loss, known)}")
        try:
            outcome: Outcome = registry.load(outcomes, loss)(**options)
        except TypeError as error:
            raise ValueError(f"the options {dict(options)} do not fit the loss {loss!r}: {error}") from error
        return outcome
    if isinstance(loss, type):
        raise ValueError(f"the loss is the class {loss.__name__}: give a function of (output, y), or an instance")
    if options:
        raise ValueError(f"the options {dict(options)} are for a named loss; bind those of a function to it")
    return outcomes.outcome_of(loss)


def _precise(output: OutputFn, precision: torch.dtype | None) -> OutputFn:
    return output if precision is None else in_precision(output, precision)


def _reference(
    module: nn.Module, tensors: ModuleTensors, evaluate: bool, precision: torch.dtype | None, part: str
) -> OutputFn:
    """Return the module itself as a pure function of its weights, with the tensors that were captured as they are.

    In a ``precision``, those of the learned weights' dtypes are cast like these.
    """
    itself = ModuleItself(module, evaluate=evaluate, keep=False)
    cast = set() if precision is None else {dtype for _, dtype in tensors.learned.values() if dtype.is_floating_point}

    def reference(params: Params, x: Tensors) -> Tensors:
        constants = {n: v.to(precision) if v.dtype in cast else v for n, v in tensors.constants.items()}
        with math_attention():
            return take_output(itself({**constants, **params}, x), part)

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


def explain_mixed_samples(loss: LossFn, params: Params, batch: Batch) -> str | None:
    """Say that a model lets the samples of a batch influence each other; None if it does not.

    One sample is replaced, in training and in evaluation mode: the outputs for all others must stay as they are.
    """
    if not isinstance(loss, ModelLoss) or count_samples(batch) < 3:
        return None
    for output in (loss.output,) if loss.random else (loss.training, loss.output):
        if _mixes(output, params, batch.x):
            return (
                "changing one sample changes what the model returns for the others, so the samples of a set influence "
                "each other, as in batch normalisation in training mode"
            )
    return None


def _mixes(output: OutputFn, params: Params, x: Tensors) -> bool:
    named = as_named(x)
    other = {name: torch.cat([_change(one[:1], one[1:2]), one[1:]]) for name, one in named.items()}
    with torch.no_grad():
        pair = [as_named(output(params, one)) for one in (x, from_named(other))]
    return any(
        not torch.allclose(a[1:].double(), b[1:].double(), rtol=1e-4, atol=1e-6, equal_nan=True)
        for a, b in zip(pair[0].values(), pair[1].values(), strict=True)
    )


def _change(sample: Tensor, other: Tensor) -> Tensor:
    return 3 * other + 1 if sample.is_floating_point() else other


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


__all__ = ["LossFn", "ModelLoss", "accuracy_of", "evaluation_loss", "model_loss", "model_output"]
