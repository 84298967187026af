"""Gradient descent with learned learning rates: Meta-SGD, and MAML++'s one rate a layer and step."""

from torch import Tensor

from online_meta.types import Carry, InnerRule, Params

PER = ("parameter", "layer", "layer_and_step")


def meta_sgd(lr: float = 0.01, per: str = "parameter", steps: int = 5) -> InnerRule:
    """Return the rule phi_{k+1} = phi_k - alpha * grad L(phi_k) whose rates alpha are learned (Li et al., 2017, eq. 3).

    ``lr`` is a positive float, where every rate starts; rates are learned as they are, and may become negative, or
    too large: over several steps a rate for every entry wants a small meta learning rate and clipped meta-gradients.
    ``per`` says what has a rate of its own:

    - ``"parameter"``: every entry of every weight, as in Meta-SGD;
    - ``"layer"``: every layer, that is the weights whose names agree up to their last dot;
    - ``"layer_and_step"``: every layer at each of the first ``steps`` inner steps, LSLR of MAML++ (Antoniou et al.,
      ICLR 2019, section 4). Steps beyond them, at an evaluation say, use the last rate.

    Raises ``ValueError`` when ``lr`` is not positive, ``per`` is none of these or ``steps`` is below 1.
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

    def update(rule: Params, carry: Carry, grads: Params, step: int) -> Carry:
        moved = {name: phi - rate(rule, name, step) * grads[name] for name, phi in carry.phi.items()}
        return Carry(moved, carry.state)

    return InnerRule(
        init=init,
        start=lambda rule, phi: Carry(phi, {}),
        update=update,
        view=lambda rule, weights: weights,
    )


def _layer(name: str) -> str:
    """Return under what name a weight's layer keeps its rate: ``body.0.lr`` for ``body.0.weight`` and its bias."""
    layer, dot, _ = name.rpartition(".")
    return f"{layer}{dot}lr"
