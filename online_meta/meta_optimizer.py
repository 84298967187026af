"""Step meta-parameters with a torch optimizer: the single-process ``Engine``."""

import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from online_meta.functional.autodiff import outside_inference_mode
from online_meta.registry import nearest
from online_meta.tree import sum_of_squares
from online_meta.types import Meta, MetaGrad, Params, StepReport, TensorFilter

OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "adamax": torch.optim.Adamax,
    "adagrad": torch.optim.Adagrad,
    "nadam": torch.optim.NAdam,
    "radam": torch.optim.RAdam,
    "rmsprop": torch.optim.RMSprop,
    "sgd": torch.optim.SGD,
}
"""The torch optimizers by name."""

OPTIONS: dict[str, dict[str, object]] = {
    "adam": {"betas": 2, "eps": "above 0", "weight_decay": "0 or more", "amsgrad": bool},
    "adamw": {"betas": 2, "eps": "above 0", "weight_decay": "0 or more", "amsgrad": bool},
    "adamax": {"betas": 2, "eps": "above 0", "weight_decay": "0 or more"},
    "adagrad": {
        "eps": "above 0",
        "weight_decay": "0 or more",
        "lr_decay": "0 or more",
        "initial_accumulator_value": "0 or more",
    },
    "nadam": {
        "betas": 2,
        "eps": "above 0",
        "weight_decay": "0 or more",
        "momentum_decay": "0 or more",
        "decoupled_weight_decay": bool,
    },
    "radam": {"betas": 2, "eps": "above 0", "weight_decay": "0 or more", "decoupled_weight_decay": bool},
    "rmsprop": {
        "alpha": "below 1",
        "eps": "above 0",
        "weight_decay": "0 or more",
        "momentum": "below 1",
        "centered": bool,
    },
    "sgd": {"momentum": "below 1", "dampening": "below 1", "weight_decay": "0 or more", "nesterov": bool},
}
"""The options of each optimizer that may be set, under torch's names: the number of its shares from 0 to below 1, the
range of a number, or bool."""

RANGES: dict[object, Callable[[float], bool]] = {
    "above 0": lambda value: value > 0,
    "0 or more": lambda value: value >= 0,
    "below 1": lambda value: 0 <= value < 1,
}
GROUPS = ("groups", "param_groups", "parameter_groups", "no_decay", "weight_decay_mask", "lr_groups", "layer_decay")
"""Options by which other programs give parts of the parameters their own rates or no weight decay."""

STATE_PREFIX = "optimizer."
"""Prefix of the names of saved optimizer state; the state's key and the parameter's name follow."""

SCALAR_STATE = ("step", "mu_product")
"""Optimizer state with one scalar per parameter; it stays on the CPU."""


class MetaOptimizer:
    """The single-process ``Engine``: holds meta-parameters and steps them with a torch optimizer.

    A step uses the gradient g = (sum of gradients) / weight, clipped to the global norm ``clip_norm``. A step whose
    loss or gradient is not finite is skipped and changes nothing. The parameters are parts of few flat buffers, so that
    a step takes few operations, whatever the number of parameters.
    """

    rank = 0
    world = 1
    gather = None
    lr_scale = 1.0

    @outside_inference_mode
    def __init__(
        self,
        meta: Meta,
        name: str = "adam",
        lr: float = 1e-3,
        clip_norm: float | None = None,
        options: Mapping[str, object] | None = None,
    ) -> None:
        """Copy ``meta`` and prepare the optimizer.

        Args:
            meta: the initial meta-parameters.
            name: a name in ``OPTIMIZERS``.
            lr: the learning rate, at least 0.
            clip_norm: the largest global norm of a gradient; None for no clipping.
            options: options of the optimizer in ``OPTIONS``, such as ``{"betas": (0.9, 0.99)}``; by default torch's.

        Raises:
            ValueError: if the name or an option is unknown, an option is out of its range, or ``lr`` is negative.
        """
        self._options = read_options(name, options or {})
        if not lr >= 0:
            raise ValueError(f"lr is {lr}: a learning rate is 0 or more")
        parameters = {name: value.detach() for name, value in flatten_meta(meta).items()}
        self._packing = plan_packing(parameters)
        self._buffers = [buffer.clone() for buffer in self._packing.join(parameters)]
        self._meta = unflatten_meta(self._packing.split(self._buffers))
        self._grads: list[Tensor] = []
        self._grad_views: list[Tensor] = []
        self._name, self._clip_norm, self._lr = name, clip_norm, lr

    @cached_property
    def _optimizer(self) -> torch.optim.Optimizer:
        """The torch optimizer, created on first use: creating one imports torch's compiler, which takes a second."""
        return make_optimizer(self._name, self._buffers, self._lr, self._options)

    def meta(self) -> Meta:
        """Return the current meta-parameters, shared with the optimizer; do not write to them."""
        return self._meta

    def apply(self, sums: MetaGrad, weight: float) -> StepReport:
        """Make one step with the gradient ``sums`` / ``weight``; report its norm before clipping."""
        if torch.is_inference_mode_enabled():  # The state of the optimizer must not hold inference tensors.
            with torch.inference_mode(False):
                return self.apply(sums, weight)
        with torch.no_grad():
            grads = self._join(order_like(sums.grads, self._meta))
            if weight != 1.0:
                torch._foreach_div_(grads, weight)
            shrink, report = measure_and_clip(grads, sums.loss, self._clip_norm)
            if report.skipped is not None:
                self._grads = []  # What lies between the tensors may be 0 / 0 now.
                return report
            if shrink != 1.0:
                torch._foreach_mul_(grads, shrink)
            self._step(grads)
            return report

    def _join(self, grads: Meta) -> list[Tensor]:
        """Return the flat buffers of gradients, which the next call writes to; names have the order of ``meta``."""
        if not self._grads:
            self._grads = [torch.zeros_like(buffer) for buffer in self._buffers]
            self._grad_views = [*self._packing.split(self._grads).values()]
        torch._foreach_copy_(self._grad_views, [*grads.weights.values(), *grads.rule.values()])
        return self._grads

    def _step(self, grads: list[Tensor]) -> None:
        for buffer, grad in zip(self._buffers, grads, strict=True):
            buffer.grad = grad
        set_lr(self._optimizer, self._lr * self.lr_scale)
        # Without what torch wraps around it for profilers and its compiler: that takes as long as a small step.
        inspect.unwrap(type(self._optimizer).step)(self._optimizer)
        for buffer in self._buffers:
            buffer.grad = None

    def save(self, keep: TensorFilter | None = None) -> Params:
        """Return CPU copies of parameters (``weights.*`` and ``rule.*``) and optimizer state (``optimizer.*``)."""
        found = flatten_meta(self._meta)
        for index, buffer in enumerate(self._buffers):
            for key, value in self._optimizer.state.get(buffer, {}).items():
                if isinstance(value, Tensor):
                    parts = self._split_state(index, key, value)
                    found |= {f"{STATE_PREFIX}{key}.{name}": part for name, part in parts.items()}
        return {name: copy_to_cpu(value) for name, value in found.items() if not keep or keep(name)}

    @outside_inference_mode
    def load(self, saved: Params) -> None:
        """Restore exactly the state that ``save`` returned.

        Raises ``ValueError`` if the names or shapes are not those of these meta-parameters; nothing is changed then.
        """
        parameters = flatten_meta(self._meta)
        check_saved(saved, {name: parameter.shape for name, parameter in parameters.items()})
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(saved[name])
        self._optimizer.state.clear()
        by_key: dict[str, Params] = {}
        for (key, name), value in saved_state(saved).items():
            by_key.setdefault(key, {})[name] = value.detach()
        for index, buffer in enumerate(self._buffers):
            for key, parts in by_key.items():
                if self._packing.names[index][0] in parts:
                    self._optimizer.state[buffer][key] = self._join_state(index, key, parts, buffer.device)

    def _split_state(self, index: int, key: str, value: Tensor) -> Params:
        """Return the state of each parameter in a buffer; all have its scalar state."""
        if key in SCALAR_STATE:
            return dict.fromkeys(self._packing.names[index], value)
        return self._packing.split_one(index, value)

    def _join_state(self, index: int, key: str, parts: Params, device: torch.device) -> Tensor:
        """Return a copy of the state of a buffer; the inverse of ``_split_state``."""
        if key in SCALAR_STATE:
            return copy_to_cpu(parts[self._packing.names[index][0]])
        return self._packing.join_one(index, parts).to(device, copy=True)


BUFFER_NUMBERS = 1 << 20
"""About the largest number of numbers in a buffer; a larger tensor has a buffer of its own."""

ALIGNMENT = 64
"""Each tensor in a buffer starts at a multiple of as many bytes, as tensors of their own do: see ``copy_aligned``."""


class Packing(NamedTuple):
    """Which part of which flat buffer each tensor is.

    Attributes:
        names: of the tensors in each buffer, in their order.
        shapes: of the tensors by name.
    """

    names: tuple[tuple[str, ...], ...]
    shapes: dict[str, torch.Size]

    def join(self, tensors: Params) -> list[Tensor]:
        """Return the buffers of all tensors; a buffer of a single tensor may be a view of it."""
        return [self.join_one(index, tensors) for index in range(len(self.names))]

    def join_one(self, index: int, tensors: Params) -> Tensor:
        """Return the buffer number ``index``, with zeros between the tensors."""
        names = self.names[index]
        if len(names) == 1:
            return tensors[names[0]].detach().reshape(-1)
        unit = ALIGNMENT // tensors[names[0]].element_size()
        gap, parts = tensors[names[0]].new_zeros(unit), list[Tensor]()
        for name in names:
            part = tensors[name].detach().reshape(-1)
            parts += [part, gap[: -len(part) % unit]]
        return torch.cat(parts)

    def split(self, buffers: Sequence[Tensor]) -> Params:
        """Return the tensors in buffers, as views; those of ``shapes``, in its order."""
        found: Params = {}
        for index, buffer in enumerate(buffers):
            found |= self.split_one(index, buffer)
        return {name: found[name] for name in self.shapes}

    def split_one(self, index: int, buffer: Tensor) -> Params:
        """Return the tensors in the buffer number ``index``, as views."""
        found, first, unit = {}, 0, ALIGNMENT // buffer.element_size()
        for name in self.names[index]:
            count = self.shapes[name].numel()
            found[name] = buffer[first : first + count].view(self.shapes[name])
            first += count + -count % unit
        return found


def plan_packing(tensors: Params) -> Packing:
    """Return how tensors are packed into few buffers, each with tensors of one dtype on one device."""
    groups: dict[tuple[torch.dtype, torch.device], list[list[str]]] = {}
    filled: dict[tuple[torch.dtype, torch.device], int] = {}
    for name, tensor in tensors.items():
        kind, count = (tensor.dtype, tensor.device), tensor.numel()
        if kind not in groups or filled[kind] + count > BUFFER_NUMBERS:
            groups.setdefault(kind, []).append([])
            filled[kind] = 0
        groups[kind][-1].append(name)
        filled[kind] += count
    names = tuple(tuple(group) for found in groups.values() for group in found)
    return Packing(names, {name: tensor.shape for name, tensor in tensors.items()})


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of all parameter groups of ``optimizer``."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def copy_to_cpu(value: Tensor) -> Tensor:
    """Return a detached copy on the CPU."""
    return value.detach().to("cpu", copy=True)


def check_optimizer_name(name: str) -> None:
    """Raise ``ValueError`` unless ``name`` is in ``OPTIMIZERS``."""
    if name not in OPTIMIZERS:
        raise ValueError(f"no optimizer is called {name!r}: {nearest(name, OPTIMIZERS)}")


def read_options(name: str, options: Mapping[str, object]) -> dict[str, Any]:
    """Return the ``options`` of the optimizer called ``name`` as torch takes them.

    Raises ``ValueError`` if the name or an option is unknown, or an option is out of its range.
    """
    check_optimizer_name(name)
    known = OPTIONS[name]
    for key, value in options.items():
        if key in GROUPS:
            raise ValueError(
                f"optimizer_options.{key}: all meta-parameters have one learning rate and one weight decay. To leave "
                "some out of the inner loop, set inner.fast; the rules meta_sgd and meta_curvature learn a rate for "
                "each weight"
            )
        if key not in known:
            raise ValueError(f"optimizer_options has no key {key!r} for {name!r}: {nearest(key, known)}")
        if not _is_valid(value, known[key]):
            raise ValueError(f"optimizer_options.{key} = {value!r}: must be {_describe(known[key])}")
    found = {key: tuple(value) if isinstance(value, list) else value for key, value in options.items()}
    if found.get("nesterov") and not (found.get("momentum", 0) and not found.get("dampening", 0)):
        raise ValueError("optimizer_options.nesterov = true needs a momentum above 0, and no dampening")
    return found


def _is_valid(value: object, wanted: object) -> bool:
    if wanted is bool:
        return isinstance(value, bool)
    if wanted == 2:
        return isinstance(value, list | tuple) and len(value) == 2 and all(_is_valid(one, "below 1") for one in value)
    return isinstance(value, int | float) and not isinstance(value, bool) and RANGES[wanted](value)


def _describe(wanted: object) -> str:
    if wanted is bool:
        return "true or false"
    return {2: "two numbers from 0 to below 1", "below 1": "a number from 0 to below 1"}.get(
        wanted, f"a number {wanted}"
    )


def make_optimizer(
    name: str, parameters: Iterable[Tensor], lr: float, options: Mapping[str, object] | None = None
) -> torch.optim.Optimizer:
    """Create the optimizer called ``name``; raise ``ValueError`` if the name or an option is wrong."""
    checked = read_options(name, options or {})
    return OPTIMIZERS[name](list(parameters), lr=lr, **checked)  # type: ignore[call-arg]


def average_and_clip(
    sums: Sequence[Tensor], loss: Tensor, weight: float, clip_norm: float | None
) -> tuple[list[Tensor], StepReport]:
    """Return ``sums`` / ``weight``, clipped to the global norm ``clip_norm``, and the step's report.

    The report has the norm before clipping; ``skipped`` is "not_finite" if the loss or the norm is not finite.
    """
    with torch.no_grad():
        mean = [grad.detach() / weight for grad in sums]
        shrink, report = measure_and_clip(mean, loss, clip_norm)
        return mean if shrink == 1.0 else [grad * shrink for grad in mean], report


def measure_and_clip(mean: Sequence[Tensor], loss: Tensor, clip_norm: float | None) -> tuple[float, StepReport]:
    """Return the factor that clips a gradient to the global norm ``clip_norm``, at most 1, and the step's report."""
    norm = math.sqrt(sum([float(sum_of_squares(grad)) for grad in mean]))
    if not (math.isfinite(norm) and math.isfinite(float(loss))):
        return 1.0, StepReport(norm, "not_finite")
    return 1.0 if clip_norm is None else min(1.0, clip_norm / (norm + 1e-12)), StepReport(norm, None)


def saved_state(saved: Params) -> dict[tuple[str, str], Tensor]:
    """Return the optimizer state in an engine's saved state, by the state's key and the parameter's name."""
    found = {}
    for full, value in saved.items():
        if full.startswith(STATE_PREFIX):
            key, name = full.removeprefix(STATE_PREFIX).split(".", 1)
            found[key, name] = value
    return found


def check_saved(saved: Params, shapes: Mapping[str, torch.Size]) -> None:
    """Raise ``ValueError`` unless an engine's saved state has parameters of exactly these names and ``shapes``."""
    for full in saved:
        name = full.removeprefix(STATE_PREFIX).split(".", 1)[1] if full.startswith(STATE_PREFIX) else full
        if name not in shapes:
            raise ValueError(f"saved {full} belongs to no parameter of this model: {nearest(full, shapes)}")
    for name, shape in shapes.items():
        found = tuple(saved[name].shape) if name in saved else None
        if found != tuple(shape):
            raise ValueError(f"saved {name} has shape {found}; this model's has {tuple(shape)}")


def flatten_meta(meta: Meta) -> Params:
    """Flatten meta-parameters under the prefixes ``weights.`` and ``rule.``."""
    return {
        **{f"weights.{name}": value for name, value in meta.weights.items()},
        **{f"rule.{name}": value for name, value in meta.rule.items()},
    }


def order_like(meta: Meta, like: Meta) -> Meta:
    """Return the meta-parameters with their names in the order of ``like``, which has the same names."""
    if list(meta.weights) == list(like.weights) and list(meta.rule) == list(like.rule):
        return meta
    return Meta({name: meta.weights[name] for name in like.weights}, {name: meta.rule[name] for name in like.rule})


def unflatten_meta(parameters: Params) -> Meta:
    """Return the meta-parameters that ``flatten_meta`` flattened."""
    weights = {n.removeprefix("weights."): value for n, value in parameters.items() if n.startswith("weights.")}
    return Meta(weights, {n.removeprefix("rule."): value for n, value in parameters.items() if n.startswith("rule.")})
