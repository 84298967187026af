"""Inner rules that use the whole seam ``InnerRule(init, start, update, view)``: state, learned parameters, a view."""

import torch

from online_meta.tree import zeros
from online_meta.types import Carry, InnerRule, Params


def momentum(lr: float = 0.05, decay: float = 0.7) -> InnerRule:
    """Heavy ball: v_{k+1} = decay v_k + g_k, phi_{k+1} = phi_k - lr v_{k+1} (Polyak, 1964)."""

    def update(rule: Params, carry: Carry, grads: Params, step: int) -> Carry:
        velocity = {name: decay * carry.state[name] + grad for name, grad in grads.items()}
        return Carry({name: phi - lr * velocity[name] for name, phi in carry.phi.items()}, velocity)

    return InnerRule(
        init=lambda weights: {},
        start=lambda rule, phi: Carry(phi, zeros(phi)),
        update=update,
        view=lambda rule, weights: weights,
    )


def meta_sgd(lr: float = 0.05) -> InnerRule:
    """Meta-SGD: phi_{k+1} = phi_k - alpha * g_k, alpha learned entry by entry (Li et al., 2017)."""

    def update(rule: Params, carry: Carry, grads: Params, step: int) -> Carry:
        return Carry({name: phi - rule[name] * grads[name] for name, phi in carry.phi.items()}, carry.state)

    return InnerRule(
        init=lambda weights: {name: torch.full_like(weight, lr) for name, weight in weights.items()},
        start=lambda rule, phi: Carry(phi, {}),
        update=update,
        view=lambda rule, weights: weights,
    )


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
