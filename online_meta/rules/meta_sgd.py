"""Gradient descent with meta-learned learning rates: Meta-SGD, and the rates per layer and step of MAML++."""

from torch import Tensor

from online_meta.types import Carry, InnerRule, Params, Seen

PER = ("parameter", "layer", "layer_and_step")


def meta_sgd(lr: float = 0.01, per: str = "parameter", steps: int = 5) -> InnerRule:
    """Return the rule phi_{k+1} = phi_k - alpha * grad L(phi_k) with learned rates alpha (Li et al., 2017, eq. 3).

    The rates are not constrained: they can become negative or too large. With one rate per entry and several inner
    steps, use a small meta learning rate and clip the meta-gradients.

    Args:
        lr: initial value of every rate, above 0.
        per: "parameter": one rate per entry of each weight, as in Meta-SGD; "layer": one per layer, i.e. for weights
            whose names agree up to the last dot; "layer_and_step": one per layer and inner step, LSLR of MAML++
            (Antoniou et al., ICLR 2019, section 4).
        steps: the number of inner steps with their own rates, at least 1, for "layer_and_step"; later steps use the
            last rate.

    Returns:
        The rule; its learned parameters are the rates.

    Raises:
        ValueError: if ``lr`` is not positive, ``per`` is unknown or ``steps`` is below 1.
    """
    if not lr > 0:
        raise ValueError(f"lr is {lr}: an inner learning rate is positive")
    if per not in PER:
        raise ValueError(f"per is {per!r}: it is one of {', '.join(PER)}")
    if steps < 1:
        raise ValueError(f"steps is {steps}: rates are learned for 1 step or more")
    shape = (steps,) if per == "layer_and_step" else ()

    def init(weights: Params) -> Params:
        if per == "parameter":
            return {name: weight.new_full(weight.shape, lr) for name, weight in weights.items()}
        return {_layer(name): weight.new_full(shape, lr) for name, weight in weights.items()}

    def rate(rule: Params, name: str, step: int) -> Tensor:
        if per == "parameter":
            return rule[name]
        return rule[_layer(name)][min(step, steps - 1)] if shape else rule[_layer(name)]

    def update(rule: Params, carry: Carry, seen: Seen, step: int) -> Carry:
        moved = {name: phi - rate(rule, name, step) * seen.grads[name] for name, phi in carry.phi.items()}
        return Carry(moved, carry.state)

    return InnerRule(
        init=init,
        start=lambda rule, phi, support: Carry(phi, {}),
        update=update,
        view=lambda rule, weights: weights,
    )


def _layer(name: str) -> str:
    """Return the name of the rate of a weight's layer: ``body.0.lr`` for ``body.0.weight`` and ``body.0.bias``."""
    layer, dot, _ = name.rpartition(".")
    return f"{layer}{dot}lr"
