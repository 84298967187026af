"""Refuse, before it is used, a loss that would silently be another one than the user wrote.

Each question is asked once for each shape of output and targets, so that a step costs a look-up.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from online_meta.batches import first_tensor, name_tensors
from online_meta.functional.autodiff import is_transformed
from online_meta.functional.randomness import capture_generator_state
from online_meta.functional.stateless import ModuleTensors
from online_meta.types import Batch, LossFn, OutputFn, Params, Tensors

Criterion = Callable[[Any, Any], Tensor]
"""(output, y) -> the scalar loss, or the losses of the samples, (n,)."""

NORM_LAYERS = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)

ELEMENTWISE = frozenset(
    {F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss, F.binary_cross_entropy, F.binary_cross_entropy_with_logits}
    | {F.poisson_nll_loss, F.kl_div, F.soft_margin_loss, F.multilabel_soft_margin_loss, F.hinge_embedding_loss}
    | {torch.poisson_nll_loss, torch.kl_div, torch.hinge_embedding_loss, torch.binary_cross_entropy_with_logits}
)
"""Torch's losses that compare the output with a target of the same shape; most broadcast if the shapes differ."""

OF_CLASSES = frozenset({F.cross_entropy, F.nll_loss})


def describe(name: str, layer: nn.Module) -> str:
    """Describe a layer by its name and class."""
    kind = type(layer).__name__
    return f"the layer {name!r} ({kind})" if name else f"the model itself ({kind})"


def find_stateful_layers(module: nn.Module) -> Iterator[str]:
    """Yield a sentence for each layer of ``module`` that changes tensors of its own when it is called."""
    for name, layer in module.named_modules():
        found = explain_state(name, layer)
        if found:
            yield found


def find_mixing_layers(module: nn.Module) -> Iterator[str]:
    """Yield a description of each layer of batch normalisation that uses the statistics of the batch itself."""
    for name, layer in module.named_modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm) and (layer.training or layer.running_mean is None):
            yield describe(name, layer)


def explain_state(name: str, layer: nn.Module) -> str | None:
    """Say why ``layer`` is no function of its weights, and the cure; None if its class changes nothing when called."""
    here = describe(name, layer)
    if isinstance(layer, nn.Embedding | nn.EmbeddingBag) and layer.max_norm is not None:
        return (
            f"{here} edits its weight in every call (max_norm), and a pure function must not: leave max_norm out, and "
            "scale what the layer returns"
        )
    if not layer.training:
        return None
    if isinstance(layer, NORM_LAYERS) and layer.track_running_stats:
        weights = [*layer.parameters()]
        if weights and not any(weight.requires_grad for weight in weights):
            return (
                f"{here} is frozen, but keeps running statistics, which a pure function of the weights cannot: call "
                f".eval() on that layer to use the statistics that it has"
            )
        return (
            f"{here} keeps running statistics, which a pure function of the weights cannot; build it "
            "with track_running_stats=False, or use GroupNorm; if its statistics are those of a pretrained model, call "
            ".eval() on that layer"
        )
    kinds = {type(one).__name__ for one in (layer, *layer._forward_pre_hooks.values())}
    if kinds & {"_SpectralNorm", "SpectralNorm"}:  # the class of a parametrisation and, deprecated, of a hook
        owner = name.partition("parametrizations.")[0].rstrip(".") or name
        return (
            f"the layer {owner!r} is under spectral normalisation, which changes its estimate of the largest singular "
            "value in every call in training mode: call .eval() on that layer after some calls in training mode"
        )
    return None


def explain_misfit(criterion: Criterion, output: Any, y: Tensors) -> str | None:
    """Say how the shapes of a model's ``output`` and of the targets ``y`` do not fit the loss; None if they fit.

    Torch's element-wise losses need equal shapes. Any other loss that broadcasts output and targets to all pairs is
    tried with single samples: the mean or sum over samples must be the loss of the batch.
    """
    if not (isinstance(output, Tensor) and isinstance(y, Tensor)):
        return None
    watch = _LossWatch(output.detach().clone(), y.detach().clone())
    value: Any = None
    try:
        with torch.no_grad(), watch:
            value = criterion(watch.output, watch.y)
    except Exception:  # The loss raises the same error where it is used, if there is no better one.
        return watch.explain()
    misfit = watch.explain()
    if misfit:
        return misfit
    if watch.all_pairs and output.shape != y.shape and not _is_sum(criterion, output, y):
        return (
            f"the loss compares an output of shape {tuple(output.shape)} with targets of shape {tuple(y.shape)} in all "
            f"pairs of their samples, by broadcasting: return an output of shape {tuple(y.shape)}, for example by "
            ".squeeze or .unsqueeze, or reshape in the loss"
        )
    if isinstance(value, Tensor) and (value.numel() == 1 or value.shape == y.shape[:1]):
        return None
    found = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
    return f"the loss returns {found}; it must return the losses of the samples, ({len(y)},), or a scalar, their mean"


class _LossWatch(TorchFunctionMode):
    """Watches a loss while it runs: whether torch's own losses get equal shapes, and what is broadcast to all pairs."""

    def __init__(self, output: Any, y: Tensor) -> None:
        super().__init__()
        self.output, self.y = output, y
        self.all_pairs = False
        self._misfits: list[str] = []
        self._from_output, self._from_y = {id(self.output)}, {id(self.y)}
        self._alive: list[Any] = []  # an id is that of one tensor as long as the tensor is alive

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        self._misfits += self._find_misfits(function, tensors)
        result = function(*args, **kwargs)
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self._alive.append(made)
        mixes = True
        for known in (self._from_output, self._from_y):
            derived = any(id(tensor) in known for tensor in tensors)
            known |= {id(tensor) for tensor in made} if derived else set()
            mixes = mixes and derived
        if mixes and made:
            together = _broadcast([tensor.shape for tensor in tensors])
            grown = together is not None and together.numel() > max(tensor.numel() for tensor in tensors)
            is_loss = getattr(function, "__module__", None) == F.__name__  # which reduces what it has broadcast
            self.all_pairs |= grown and (together == made[0].shape or is_loss)
        return result

    def explain(self) -> str | None:
        """Say how the shapes do not fit a loss of torch's that was called; None if they fit."""
        return next(iter(self._misfits), None)

    def _find_misfits(self, function: Any, tensors: list[Tensor]) -> Iterator[str]:
        if len(tensors) < 2:
            return
        output, y = tensors[:2]
        if function in ELEMENTWISE and output.shape != y.shape:
            if output is self.output and y is self.y:
                yield (
                    f"the loss ({function.__name__}) compares element by element, but the output has shape "
                    f"{tuple(output.shape)} and the targets {tuple(y.shape)}: return an output of shape "
                    f"{tuple(y.shape)}"
                )
        elif function in OF_CLASSES and output.dim() < 2:
            yield (
                f"the loss ({function.__name__}) needs an output of shape (n, classes), but it has shape "
                f"{tuple(output.shape)}, which counts as the classes of one sample"
            )


def _broadcast(shapes: list[torch.Size]) -> torch.Size | None:
    try:
        together: torch.Size = torch.broadcast_shapes(*shapes)  # type: ignore[no-untyped-call]
        return together
    except RuntimeError:
        return None


def _is_sum(criterion: Criterion, output: Tensor, y: Tensor) -> bool:
    """Return whether the loss of a batch is the mean or the sum of the losses of its samples."""
    if output.dim() == 0 or y.dim() == 0 or len(output) != len(y):
        return False
    random = torch.Generator().manual_seed(0)

    def vary(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        share = [torch.rand(tensor.shape, generator=random, dtype=torch.float64).to(tensor.device) for _ in range(2)]
        # Equal samples would hide the difference; values in (0, 1), such as probabilities, stay there.
        return tensor.detach().double() * (1 - 0.1 * share[0]) + 0.01 * share[1]

    output, y = vary(output), vary(y)
    try:
        with torch.no_grad():
            whole = float(criterion(output, y))
            each = [float(criterion(output[i : i + 1], y[i : i + 1])) for i in range(len(y))]
    except Exception:  # A loss that cannot take one sample is no mean over samples.
        return False
    total = sum(each)
    return any(abs(whole - value) <= 1e-6 * (abs(value) + 1e-12) for value in (total, total / len(each)))


def _compare_outputs(found: Any, right: Any, dtypes: set[torch.dtype]) -> str | None:
    """Say by how much two outputs differ, beyond the rounding of the coarsest of ``dtypes``; None if they agree."""
    if isinstance(found, dict) and isinstance(right, dict):
        if found.keys() != right.keys():
            return f"an output of {sorted(found)} instead of {sorted(right)}"
        return next(filter(None, (_compare_outputs(found[name], right[name], dtypes) for name in right)), None)
    if not (isinstance(found, Tensor) and isinstance(right, Tensor)):
        return None
    if found.shape != right.shape or found.dtype != right.dtype:
        return f"{found.dtype} of shape {tuple(found.shape)} instead of {right.dtype} of shape {tuple(right.shape)}"
    if not (found.is_floating_point() or found.is_complex()):
        return None if torch.equal(found, right) else "other integers"
    coarsest = max((torch.finfo(dtype).eps for dtype in (*dtypes, right.dtype) if _is_inexact(dtype)), default=0.0)
    finite = torch.isfinite(right)
    if not torch.equal(torch.isfinite(found), finite):
        return "not finite where it is finite, or the other way round"
    wide = torch.complex128 if right.is_complex() else torch.float64
    ours, theirs = found.detach()[finite].to(wide), right.detach()[finite].to(wide)
    error, size = float((ours - theirs).norm()), float(theirs.norm())
    return None if error <= min(1e3 * coarsest, 0.05) * size else f"off by {error:.1e} of {size:.1e}"


def _is_inexact(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point or dtype.is_complex


@dataclass
class LossGuard:
    """Checks a loss when it is called first, and when it is called with new shapes.

    Attributes:
        faults: sentences on what makes the module no function of its weights; any call is refused.
        tensors: what the loss holds of the module; a forward pass must not edit its constants.
        reference: (params, x) -> what the user's own module gives. It raises when the module is gone.
        repeatable: whether two calls must give the same output: the model counts as one without random numbers.
        compares: whether the first call compares the output with that of a second call and of the module. Learners do.
        separate: whether the samples of a batch are known not to influence each other.
    """

    faults: tuple[str, ...]
    tensors: ModuleTensors
    reference: OutputFn
    repeatable: bool
    compares: bool = False
    separate: bool = False
    _fitting: set[Any] = field(default_factory=set)
    _tried: bool = False

    def run(self, output: OutputFn, criterion: Criterion, params: Params, batch: Batch) -> Tensor:
        """Return the loss of ``batch``. Raises ``ValueError`` if it is not the one that the user's model has."""
        return self.judge(criterion, self.call(output, params, batch.x), batch.y)

    def call(self, output: OutputFn, params: Params, x: Tensors) -> Tensors:
        """Return the output for ``x``. Raises ``ValueError`` if it is not that of the user's model."""
        if self.faults:
            raise ValueError("; ".join(self.faults))
        return output(params, x) if self._tried or is_abstract() else self._call_first(output, params, x)

    def judge(self, criterion: Criterion, found: Tensors, y: Tensors) -> Tensor:
        """Return the loss of the output ``found``. Raises ``ValueError`` if output and targets do not fit the loss."""
        if not (isinstance(found, Tensor) and isinstance(y, Tensor)):
            return criterion(found, y)
        abstract = is_abstract()
        key = (abstract, found.shape, y.shape, y.dtype)
        if key in self._fitting:
            return criterion(found, y)
        if abstract:
            loss = _watch_call(criterion, found, y)
        else:
            with _same_random_numbers(y)():
                misfit = explain_misfit(criterion, found, y)
            if misfit is not None:
                raise ValueError(misfit)
            loss = criterion(found, y)
        self._fitting.add(key)
        return loss

    def _call_first(self, output: OutputFn, params: Params, x: Tensors) -> Tensors:
        """Return the output, after a check that nothing given was edited, and a comparison if this one ``compares``."""
        given = {f"the weight {name!r}": value for name, value in params.items()}
        given |= {f"the buffer {name!r}": value for name, value in self.tensors.constants.items()}
        given |= name_tensors("its input x", x)
        before = {name: value._version for name, value in given.items() if not value.is_inference()}
        again = _same_random_numbers(x)
        found = output(params, x)
        edited = [name for name, version in before.items() if given[name]._version != version]
        if edited:
            raise ValueError(f"forward edits {', '.join(edited)}, and {PURE}")
        difference = self._compare(output, found, params, x, again) if self.compares else None
        if difference is not None:
            raise ValueError(difference)
        self._tried = True
        return found

    def _compare(
        self,
        output: OutputFn,
        found: Any,
        params: Params,
        x: Tensors,
        again: Callable[[], AbstractContextManager[None]],
    ) -> str | None:
        """Say what differs: a second call, or the module; ``again`` starts from the random state before ``found``."""
        difference = self._explain_repetition(output, found, params, x) if self.repeatable else None
        # A copy may have kept some weights of the original, so compare at other weights, too.
        others = {name: 1.01 * value.detach() + 0.01 for name, value in params.items()}
        for at in (params, others):
            with again(), torch.no_grad():
                one = output(at, x)
            with again():
                difference = difference or self.explain_difference(one, at, x)
        return difference

    def _explain_repetition(self, output: OutputFn, found: Any, params: Params, x: Tensors) -> str | None:
        """Say that the model draws random numbers or keeps state, if a second call gives another output."""
        with _same_random_numbers(x)(), torch.no_grad():  # of after the first call, so that they are others
            difference = _compare_outputs(output(params, x), found, self._dtypes(params))
        return difference and f"repeated calls of the model differ ({difference}); {REPEATABLE}"

    def _dtypes(self, params: Params) -> set[torch.dtype]:
        return {value.dtype for value in (*params.values(), *self.tensors.constants.values())}

    def explain_difference(self, found: Any, params: Params, x: Tensors) -> str | None:
        """Say how the output ``found`` differs from that of the module; None if it does not, or cannot be compared.

        The module draws the same random numbers if torch's generator is in the state from before ``found``.
        """
        learned = self.tensors.learned
        if any(value.dtype != learned[name][1] for name, value in params.items() if name in learned):
            return None
        try:
            with torch.no_grad():
                right = self.reference(params, x)
        except Exception:  # The module is gone or was changed since, so that there is nothing to compare with.
            return None
        difference = _compare_outputs(found, right, self._dtypes(params))
        return difference and f"the loss does not compute what the model does ({difference}): {REMAKE}"


class CheckedLoss:
    """A loss of the user's own that is checked when it is called first, as ``LossGuard`` does for ``om.model_loss``.

    The layers that it calls may change no tensors of their own, and it may edit nothing that it is given. All its
    attributes are those of the loss.
    """

    def __init__(self, loss: LossFn) -> None:
        """Take the loss."""
        self._loss, self._checked = loss, False

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the loss."""
        if name == "_loss":  # of a copy that has none yet
            raise AttributeError(name)
        return getattr(self._loss, name)

    def __call__(self, params: Params, batch: Batch) -> Tensor:
        """Return the loss of ``batch``. Raises ``ValueError`` if it is no function of ``params`` and ``batch``."""
        if self._checked or is_abstract():
            return self._loss(params, batch)
        given = {f"the weight {name!r}": value for name, value in params.items()}
        given |= name_tensors("its input x", batch.x) | name_tensors("the targets y", batch.y)
        before = {name: value._version for name, value in given.items() if not value.is_inference()}
        layers: dict[nn.Module, str] = {}
        thread = threading.get_ident()

        def enter(layer: nn.Module, args: Any) -> None:
            if threading.get_ident() == thread and layer not in layers:  # A model is called before its layers.
                layers.update({one: name for name, one in layer.named_modules()})

        hook = register_module_forward_pre_hook(enter)
        try:
            found = self._loss(params, batch)
        finally:
            hook.remove()
        edited = [name for name, version in before.items() if given[name]._version != version]
        # Only now have the layers their own weights again, frozen or not.
        faults = [fault for layer, name in layers.items() if (fault := explain_state(name, layer))]
        if faults or edited:
            raise ValueError(faults[0] if faults else f"forward edits {', '.join(edited)}, and {PURE}")
        self._checked = True
        return found


PURE = (
    "a pure function must not: make a new tensor (y = y + x, not y += x), and keep no state between calls; if a layer "
    "only does so in training mode, call .eval() on that layer"
)

REPEATABLE = (
    "a round must be repeatable, so draw in nn.Dropout layers, which are found and seeded, or use "
    "model_loss(..., random=True)"
)

REMAKE = (
    "if the model was changed since, make the loss again; otherwise a copy of the model behaves differently, so keep "
    "all that forward uses in attributes of the model"
)


def _watch_call(criterion: Criterion, output: Any, y: Tensor) -> Tensor:
    """Return the loss; raise ``ValueError`` if a loss of torch's got unequal shapes.

    Where tensors are abstract, values cannot be compared, and a further call would be recorded: this watches the call.
    """
    watch = _LossWatch(output, y)
    try:
        with watch:
            loss = criterion(output, y)
    except Exception:
        if watch.explain() is None:
            raise
    misfit = watch.explain()
    if misfit is not None:
        raise ValueError(misfit)
    return loss


def _same_random_numbers(like: Tensors) -> Callable[[], AbstractContextManager[None]]:
    """Return a context that starts from torch's random state of now, and restores the one that it finds."""
    x = first_tensor(like)
    return capture_generator_state([x.device.index or 0] if x.is_cuda else [])


def is_abstract() -> bool:
    """Return whether tensors have no values of their own here: under ``vmap``, or where operations are recorded."""
    return is_transformed() or torch._C._len_torch_dispatch_stack() > 0
