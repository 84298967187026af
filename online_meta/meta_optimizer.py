"""A torch optimizer over meta-parameters: the single-process ``Engine``."""

import math

import torch
from torch import Tensor

from online_meta.registry import nearest
from online_meta.types import Meta, MetaGrad, Params, StepReport

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


class MetaOptimizer:
    """Steps meta-parameters in this process; implements ``Engine`` with one rank.

    A step subtracts the optimizer's direction for g = (sum of gradients) / weight, clipped to the global
    norm ``clip_norm``. A step whose loss or gradient is not finite is skipped and changes nothing.
    """

    rank = 0
    world = 1

    def __init__(self, meta: Meta, name: str = "adam", lr: float = 1e-3, clip_norm: float | None = None) -> None:
        """Copy ``meta`` and start the optimizer called ``name`` with learning rate ``lr``.

        Raises ``ValueError`` for an unknown name.
        """
        if name not in OPTIMIZERS:
            raise ValueError(f"no optimizer is called {name!r}: {nearest(name, OPTIMIZERS)}")
        self._meta = Meta(*({n: w.detach().clone() for n, w in part.items()} for part in meta))
        self._clip_norm = clip_norm
        self._optimizer = OPTIMIZERS[name](list(_named(self._meta).values()), lr=lr)  # type: ignore[call-arg]

    def meta(self) -> Meta:
        """The current meta-parameters, shared with the optimizer: not to be written."""
        return self._meta

    def apply(self, sums: MetaGrad, weight: float) -> StepReport:
        """Make one step on the weighted mean ``sums`` / ``weight``; report its gradient's norm."""
        parameters, grads = _named(self._meta), _named(sums.grads)
        with torch.no_grad():
            mean = {name: grads[name].detach() / weight for name in parameters}
            norm = math.sqrt(sum(float(g.double().square().sum()) for g in mean.values()))
            if not (math.isfinite(norm) and math.isfinite(float(sums.loss))):
                return StepReport(norm, "not_finite")
            shrink = 1.0 if self._clip_norm is None else min(1.0, self._clip_norm / (norm + 1e-12))
            for name, parameter in parameters.items():
                parameter.grad = mean[name] * shrink
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return StepReport(norm, None)

    def save(self) -> Params:
        """Return meta-parameters under ``weights.`` and ``rule.``, and the state under ``optimizer.``."""
        parameters = _named(self._meta)
        saved = {name: value.detach().clone() for name, value in parameters.items()}
        for name, parameter in parameters.items():
            for key, value in self._optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    saved[f"optimizer.{key}.{name}"] = value.detach().clone()
        return saved

    def load(self, saved: Params) -> None:
        """Take up exactly what ``save`` gave.

        Raises ``ValueError`` when the names or shapes are not those of these meta-parameters; nothing is changed then.
        """
        parameters = _named(self._meta)
        state = {full: full.removeprefix("optimizer.").split(".", 1) for full in saved if full.startswith("optimizer.")}
        for full in saved:
            if (state[full][-1] if full in state else full) not in parameters:
                raise ValueError(f"saved {full} belongs to no parameter of this model: {nearest(full, parameters)}")
        for name, parameter in parameters.items():
            found = tuple(saved[name].shape) if name in saved else None
            if found != tuple(parameter.shape):
                raise ValueError(f"saved {name} has shape {found}; this model's has {tuple(parameter.shape)}")
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(saved[name])
        self._optimizer.state.clear()
        for full, (key, name) in state.items():
            self._optimizer.state[parameters[name]][key] = saved[full].detach().clone()


def _named(meta: Meta) -> Params:
    """Flatten meta-parameters under the prefixes ``weights.`` and ``rule.``."""
    return {
        **{f"weights.{name}": value for name, value in meta.weights.items()},
        **{f"rule.{name}": value for name, value in meta.rule.items()},
    }
