"""An inner rule that uses all of ``InnerRule(init, start, update, view)``: state, learned parameters, a view."""

import torch

from online_meta.types import Carry, InnerRule, Params


def whole_seam(lr: float = 0.05) -> InnerRule:
    """All four functions at once: learned rates that decay by step, a state that starts from phi, a learned view."""

    def init(weights: Params) -> Params:
        rates = {f"rate.{name}": weight.new_full((), lr) for name, weight in weights.items()}
        return rates | {f"scale.{name}": torch.ones_like(weight) for name, weight in weights.items()}

    def start(rule: Params, phi: Params) -> Carry:
        return Carry(phi, {name: 0.1 * rule[f"scale.{name}"] * value.sin() for name, value in phi.items()})

    def update(rule: Params, carry: Carry, grads: Params, step: int) -> Carry:
        state = {name: 0.5 * value + grads[name] for name, value in carry.state.items()}
        moved = {n: phi - rule[f"rate.{n}"] / (1 + step) * state[n] for n, phi in carry.phi.items()}
        return Carry(moved, state)

    def view(rule: Params, weights: Params) -> Params:
        return {name: value * rule.get(f"scale.{name}", 1.0) for name, value in weights.items()}

    return InnerRule(init, start, update, view)
