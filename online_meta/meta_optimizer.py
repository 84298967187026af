"""A torch optimizer over meta-parameters: the single-process ``Engine``."""

import math
from collections.abc import Iterable, Mapping
from functools import cached_property

import torch
from torch import Tensor

from online_meta.registry import nearest
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
"""The optimizers that have a name."""

STATE_PREFIX = "optimizer."
"""What the names of saved optimizer state begin with; the state's key and the parameter's name follow."""

SCALAR_STATE = ("step", "mu_product")
"""State that is one number a parameter; it stays on the CPU."""


class MetaOptimizer:
    """Steps meta-parameters in this process; implements ``Engine`` with one rank.

    A step subtracts the optimizer's direction for g = (sum of gradients) / weight, clipped to the global
    norm ``clip_norm``. A step whose loss or gradient is not finite is skipped and changes nothing.
    """

    rank = 0
    world = 1
    gather = None
    lr_scale = 1.0

    def __init__(self, meta: Meta, name: str = "adam", lr: float = 1e-3, clip_norm: float | None = None) -> None:
        """Copy ``meta``, to be stepped by the optimizer called ``name`` with learning rate ``lr``.

        Raises ``ValueError`` for an unknown name, or a learning rate below 0.
        """
        check_optimizer_name(name)
        if not lr >= 0:
            raise ValueError(f"lr is {lr}: a learning rate is 0 or more")
        self._meta = Meta(*({n: w.detach().clone() for n, w in part.items()} for part in meta))
        self._name, self._clip_norm, self._lr = name, clip_norm, lr

    @cached_property
    def _optimizer(self) -> torch.optim.Optimizer:
        """Made when it is needed: with the first one torch imports its compiler, which takes a second."""
        return make_optimizer(self._name, flatten_meta(self._meta).values(), self._lr)

    def meta(self) -> Meta:
        """The current meta-parameters, shared with the optimizer: not to be written."""
        return self._meta

    def apply(self, sums: MetaGrad, weight: float) -> StepReport:
        """Make one step on the weighted mean ``sums`` / ``weight``; report its gradient's norm."""
        grads, report = average_and_clip(sums, weight, self._clip_norm)
        if report.skipped is None:
            for name, parameter in flatten_meta(self._meta).items():
                parameter.grad = grads[name]
            set_lr(self._optimizer, self._lr * self.lr_scale)
            self._optimizer.step()
            self._optimizer.zero_grad(set_to_none=True)
        return report

    def save(self, keep: TensorFilter | None = None) -> Params:
        """Return meta-parameters under ``weights.`` and ``rule.``, and the state under ``optimizer.``; on the CPU."""
        parameters = flatten_meta(self._meta)
        state = {
            f"{STATE_PREFIX}{key}.{name}": value
            for name, parameter in parameters.items()
            for key, value in self._optimizer.state.get(parameter, {}).items()
            if isinstance(value, Tensor)
        }
        return {name: copy_to_cpu(value) for name, value in {**parameters, **state}.items() if not keep or keep(name)}

    def load(self, saved: Params) -> None:
        """Take up exactly what ``save`` gave.

        Raises ``ValueError`` when the names or shapes are not those of these meta-parameters; nothing is changed then.
        """
        parameters = flatten_meta(self._meta)
        check_saved(saved, {name: parameter.shape for name, parameter in parameters.items()})
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(saved[name])
        self._optimizer.state.clear()
        for (key, name), value in saved_state(saved).items():
            device = "cpu" if key in SCALAR_STATE else parameters[name].device
            self._optimizer.state[parameters[name]][key] = value.detach().to(device, copy=True)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Let the next step of ``optimizer`` go by the learning rate ``lr``."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def copy_to_cpu(value: Tensor) -> Tensor:
    """Return a copy that later steps leave alone, and that takes no memory of an accelerator."""
    return value.detach().to("cpu", copy=True)


def check_optimizer_name(name: str) -> None:
    """Raise ``ValueError`` unless an optimizer is called ``name``."""
    if name not in OPTIMIZERS:
        raise ValueError(f"no optimizer is called {name!r}: {nearest(name, OPTIMIZERS)}")


def make_optimizer(name: str, parameters: Iterable[Tensor], lr: float) -> torch.optim.Optimizer:
    """Return the optimizer called ``name``; raises ``ValueError`` for an unknown one."""
    check_optimizer_name(name)
    return OPTIMIZERS[name](list(parameters), lr=lr)  # type: ignore[call-arg]


def average_and_clip(sums: MetaGrad, weight: float, clip_norm: float | None) -> tuple[Params, StepReport]:
    """Return ``sums`` / ``weight`` by name, clipped to the global norm ``clip_norm``, and the report of such a step.

    The report has the norm before clipping, and says when the loss or the norm is not finite.
    """
    with torch.no_grad():
        mean = {name: grad.detach() / weight for name, grad in flatten_meta(sums.grads).items()}
        norm = math.sqrt(sum(float(grad.double().square().sum()) for grad in mean.values()))
        if not (math.isfinite(norm) and math.isfinite(float(sums.loss))):
            return mean, StepReport(norm, "not_finite")
        shrink = 1.0 if clip_norm is None else min(1.0, clip_norm / (norm + 1e-12))
        return {name: grad * shrink for name, grad in mean.items()}, StepReport(norm, None)


def saved_state(saved: Params) -> dict[tuple[str, str], Tensor]:
    """Return the optimizer's part of what an engine saved, by the state's key and the parameter's name."""
    found = {}
    for full, value in saved.items():
        if full.startswith(STATE_PREFIX):
            key, name = full.removeprefix(STATE_PREFIX).split(".", 1)
            found[key, name] = value
    return found


def check_saved(saved: Params, shapes: Mapping[str, torch.Size]) -> None:
    """Raise ``ValueError`` when what an engine saved is not of parameters with these names and ``shapes``."""
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


def unflatten_meta(parameters: Params) -> Meta:
    """Take apart what ``flatten_meta`` made."""
    weights = {n.removeprefix("weights."): value for n, value in parameters.items() if n.startswith("weights.")}
    return Meta(weights, {n.removeprefix("rule."): value for n, value in parameters.items() if n.startswith("rule.")})
