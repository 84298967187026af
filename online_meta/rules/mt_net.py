"""MT-net: a T-net that learns, too, which units adapt."""

import torch
from torch import Tensor

from online_meta.rules.t_net import identities, owner_of, transform
from online_meta.types import Carry, InnerRule, Params


def mt_net(lr: float = 0.01, temperature: float = 1.0, straight_through: bool = False) -> InnerRule:
    """Return the rule of MT-nets: T (W x + b), W - lr M * grad L, M a learned random mask (Lee & Choi, ICML 2018).

    Row j of M, for output unit j of W and its bias, is one number, drawn once a task by Gumbel-softmax (section 3.2):
    m_j = exp((zeta_j + g_1) / temperature) / (exp((zeta_j + g_1) / temperature) + exp(g_2 / temperature)) with
    g_1, g_2 ~ Gumbel(0, 1) and zeta learned from 0. As the paper writes it, this is the relaxed mask, in (0, 1);
    with ``straight_through`` it is rounded to 0 or 1 and keeps the relaxed one's derivative, as in the authors' code:
    gradients of the logits are then not those of the loss. ``lr`` and ``temperature`` are positive floats.
    T is that of ``t_net``; weights without one adapt by gradient descent. Not for ``vmap``: each task has its seed.
    Raises ``ValueError`` when they are not positive.
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

    def start(rule: Params, phi: Params) -> Carry:
        # The state is what was drawn, and the mask is made of it at each step: so the logits are a part of every step.
        return Carry(phi, {name: _draw(logits) for name, logits in rule.items() if name.endswith(".logits")})

    def mask(rule: Params, state: Params, name: str) -> Tensor:
        soft = torch.sigmoid((rule[name] + state[name]) / temperature)
        return soft + (soft.round() - soft).detach() if straight_through else soft

    def update(rule: Params, carry: Carry, grads: Params, step: int) -> Carry:
        masks = {name.removesuffix(".logits"): mask(rule, carry.state, name) for name in carry.state}
        moved = {}
        for name, phi in carry.phi.items():
            owner = owner_of(name)
            rows = masks[owner].reshape(-1, *[1] * (phi.ndim - 1)) if owner in masks else 1.0
            moved[name] = phi - lr * rows * grads[name]
        return Carry(moved, carry.state)

    return InnerRule(init=init, start=start, update=update, view=transform, random=True)


def _draw(logits: Tensor) -> Tensor:
    """Return g_1 - g_2 like ``logits``: the difference of two Gumbel variables is logistic."""
    return torch.logit(torch.rand_like(logits), eps=torch.finfo(logits.dtype).eps)
