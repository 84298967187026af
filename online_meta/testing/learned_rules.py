"""Inner rules that use all of ``InnerRule``: state, learned parameters, a view, the support set, the loss."""

import torch

from online_meta.functional.keyed import normal_like, uniform_like
from online_meta.types import Batch, Carry, InnerRule, Params, Seen

CONTEXT = "context.of.the.task"
"""A name of phi that no weight has."""


def whole_seam(lr: float = 0.05) -> InnerRule:
    """All four functions at once: learned rates that decay by step, a state that starts from phi, a learned view."""

    def init(weights: Params) -> Params:
        rates = {f"rate.{name}": weight.new_full((), lr) for name, weight in weights.items()}
        return rates | {f"scale.{name}": torch.ones_like(weight) for name, weight in weights.items()}

    def start(rule: Params, phi: Params, support: Batch) -> Carry:
        return Carry(phi, {name: 0.1 * rule[f"scale.{name}"] * value.sin() for name, value in phi.items()})

    def update(rule: Params, carry: Carry, seen: Seen, step: int) -> Carry:
        state = {name: 0.5 * value + seen.grads[name] for name, value in carry.state.items()}
        moved = {n: phi - rule[f"rate.{n}"] / (1 + step) * state[n] for n, phi in carry.phi.items()}
        return Carry(moved, state)

    def view(rule: Params, weights: Params) -> Params:
        return {name: value * rule.get(f"scale.{name}", 1.0) for name, value in weights.items()}

    return InnerRule(init, start, update, view)


def reads_the_support(lr: float = 0.05) -> InnerRule:
    """Start from what the support set says; phi has a context of its own, with a row for each support sample.

    The context shifts every weight that adapts, so its gradient is not 0, and it descends as the weights do.
    """

    def init(weights: Params) -> Params:
        return {f"shift.{name}": 0.1 * torch.ones_like(weight) for name, weight in weights.items()}

    def start(rule: Params, phi: Params, support: Batch) -> Carry:
        assert isinstance(support.x, torch.Tensor)
        some = next(iter(phi.values()))
        context = torch.tanh(support.x.flatten(1).to(some.dtype).mean(1))
        moved = {name: value + rule[f"shift.{name}"] * context.mean() for name, value in phi.items()}
        return Carry(moved | {CONTEXT: context}, {})

    def update(rule: Params, carry: Carry, seen: Seen, step: int) -> Carry:
        return Carry({name: phi - lr * seen.grads[name] for name, phi in carry.phi.items()}, carry.state)

    def view(rule: Params, weights: Params) -> Params:
        context = weights.get(CONTEXT)
        shifts = {} if context is None else {name: value * context.mean() for name, value in rule.items()}
        return {name: value + shifts.get(f"shift.{name}", 0.0) for name, value in weights.items() if name != CONTEXT}

    return InnerRule(init, start, update, view)


def reads_the_loss(lr: float = 0.05) -> InnerRule:
    """Descend with rates that grow with the loss, which the state remembers."""

    def start(rule: Params, phi: Params, support: Batch) -> Carry:
        return Carry(phi, {"loss": torch.zeros_like(next(iter(phi.values())).sum())})

    def update(rule: Params, carry: Carry, seen: Seen, step: int) -> Carry:
        remembered = 0.5 * carry.state["loss"] + seen.loss
        rate = lr * torch.tanh(1.0 + remembered)
        return Carry({name: phi - rate * seen.grads[name] for name, phi in carry.phi.items()}, {"loss": remembered})

    return InnerRule(lambda weights: {}, start, update, lambda rule, weights: weights)


def sees_the_loss_alone(lr: float = 0.05) -> InnerRule:
    """Move along learned directions, as far as the loss says: an optimizer that knows no gradient."""

    def init(weights: Params) -> Params:
        return {
            name: torch.linspace(-1, 1, weight.numel()).to(weight).reshape(weight.shape)
            for name, weight in weights.items()
        }

    def start(rule: Params, phi: Params, support: Batch) -> Carry:
        return Carry(phi, {"last": torch.zeros_like(next(iter(phi.values())).sum())})

    def update(rule: Params, carry: Carry, seen: Seen, step: int) -> Carry:
        assert seen.grads == {}
        size = lr * (seen.loss - 0.5 * carry.state["last"])
        return Carry({name: phi + size * rule[name] for name, phi in carry.phi.items()}, {"last": seen.loss})

    return InnerRule(init, start, update, lambda rule, weights: weights, sees="loss")


def draws_by_key(lr: float = 0.05) -> InnerRule:
    """Start around the weights, and add noise of a learned size to each step (Welling & Teh, ICML 2011)."""

    def init(weights: Params) -> Params:
        return {name: 0.05 * torch.ones_like(weight) for name, weight in weights.items()}

    def start(rule: Params, phi: Params, support: Batch) -> Carry:
        return Carry({name: value + rule[name] * normal_like(value) for name, value in phi.items()}, {})

    def update(rule: Params, carry: Carry, seen: Seen, step: int) -> Carry:
        moved = {
            name: phi - lr * seen.grads[name] * (0.5 + uniform_like(phi)) + lr * rule[name] * normal_like(phi)
            for name, phi in carry.phi.items()
        }
        return Carry(moved, carry.state)

    return InnerRule(init, start, update, lambda rule, weights: weights, random="keyed")
