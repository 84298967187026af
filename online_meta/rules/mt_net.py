"""MT-net: a T-net that also learns which units adapt."""

import torch
from torch import Tensor

from online_meta.rules.t_net import identities, owner_of, transform
from online_meta.types import Batch, Carry, InnerRule, Params, Seen


def mt_net(lr: float = 0.01, temperature: float = 1.0, straight_through: bool = False) -> InnerRule:
    """Return the rule of MT-nets: T (W x + b), W - lr M * grad L, M a learned random mask (Lee & Choi, ICML 2018).

    Row j of M, for output unit j of W and its bias, is one number, drawn once per task by Gumbel-softmax (section 3.2):
    m_j = exp((zeta_j + g_1) / temperature) / (exp((zeta_j + g_1) / temperature) + exp(g_2 / temperature)) with
    g_1, g_2 ~ Gumbel(0, 1). The logits zeta are meta-learned and start at 0. T is that of ``t_net``; weights without a
    T adapt by gradient descent. The rule is random, so it does not run under ``vmap``: each task has its own seed.

    Args:
        lr: inner learning rate, above 0.
        temperature: of the Gumbel-softmax, above 0; masks are closer to 0 or 1 the smaller it is.
        straight_through: round the mask to 0 or 1 and keep the derivative of the relaxed mask, as in the authors' code;
            gradients of the logits are then not those of the loss. By default the mask is relaxed, as in the paper.

    Returns:
        The rule; it learns the matrices T and the logits.

    Raises:
        ValueError: if ``lr`` or ``temperature`` is not positive.
    """
    if not lr > 0:
        raise ValueError(f"lr is {lr}: an inner learning rate is positive")
    if not temperature > 0:
        raise ValueError(
            f"temperature is {temperature}: it is positive, and masks are nearer to 0 or 1 the smaller it is"
        )

    def init(weights: Params) -> Params:
        metric = identities(weights)
        return metric | {f"{name}.logits": weights[name].new_zeros(len(matrix)) for name, matrix in metric.items()}

    def start(rule: Params, phi: Params, support: Batch) -> Carry:
        # The state holds the random draws; each step computes the mask from them, so every step depends on the logits.
        return Carry(phi, {name: _draw(logits) for name, logits in rule.items() if name.endswith(".logits")})

    def mask(rule: Params, state: Params, name: str) -> Tensor:
        soft = torch.sigmoid((rule[name] + state[name]) / temperature)
        return soft + (soft.round() - soft).detach() if straight_through else soft

    def update(rule: Params, carry: Carry, seen: Seen, step: int) -> Carry:
        masks = {name.removesuffix(".logits"): mask(rule, carry.state, name) for name in carry.state}
        moved = {}
        for name, phi in carry.phi.items():
            owner = owner_of(name)
            rows = masks[owner].reshape(-1, *[1] * (phi.ndim - 1)) if owner in masks else 1.0
            moved[name] = phi - lr * rows * seen.grads[name]
        return Carry(moved, carry.state)

    return InnerRule(init=init, start=start, update=update, view=transform, random=True)


def _draw(logits: Tensor) -> Tensor:
    """Draw g_1 - g_2 in the shape of ``logits``: the difference of two Gumbel variables is logistic."""
    return torch.logit(torch.rand_like(logits), eps=torch.finfo(logits.dtype).eps)
