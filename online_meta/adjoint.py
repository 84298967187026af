"""Differentiate through an inner loop backwards, one step's graph at a time."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import vjp

from online_meta.inner import Inner, begin, fast_weights, see, slow_weights
from online_meta.tree import add
from online_meta.types import Carry, Meta, MetaGrad, Task

Move = Callable[[Meta, Carry], Carry]
"""One inner step as a function of (slow weights and rule, carry), to be differentiated going back."""

Play = Callable[[Meta, Carry, int], tuple[Carry, Move]]
"""Make step k without a graph; return the next carry and the ``Move`` that going back differentiates."""


def pull_back(inner: Inner, meta: Meta, task: Task, play: Play) -> MetaGrad:
    """Return the query loss and its gradient by lambda_k = (d move_k / d carry_k)^T lambda_{k+1}.

    Each estimator is a choice of ``play``: what it calls the step, and what it holds constant in it.
    Only the trajectory carry_0..carry_K is kept (Maclaurin et al., ICML 2015, recompute it instead);
    the memory of a graph is that of one step, whatever ``inner.steps`` is.
    """
    with torch.no_grad():
        held = Meta(slow_weights(inner, meta.weights), meta.rule)
        carry = begin(inner, meta)
        trajectory: list[tuple[Carry, Move]] = []
        for k in range(inner.steps):
            following, move = play(held, carry, k)
            trajectory.append((carry, move))
            carry = following

        def judge(held: Meta, carry: Carry) -> Tensor:
            return inner.loss(see(inner, held, carry.phi), task.query)

        loss, pull = _vjp(judge, held, carry)
        total, adjoint = pull(torch.ones_like(loss))
        while trajectory:
            carry, move = trajectory.pop()
            _, pull = _vjp(move, held, carry)
            share, adjoint = pull(adjoint)
            total = add(total, share)
        return MetaGrad(loss, _through_begin(inner, meta, total, adjoint))


def _through_begin(inner: Inner, meta: Meta, total: Meta, adjoint: Carry) -> Meta:
    """Pull the first carry's adjoint back to phi_0 = w and to what made the rule's state."""
    _, pull = _vjp(lambda fast: begin(inner, fast), Meta(fast_weights(inner, meta.weights), meta.rule))
    (share,) = pull(adjoint)
    weights = {**total.weights, **share.weights}
    return Meta({name: weights[name] for name in meta.weights}, add(total.rule, share.rule))


def _vjp(function: Callable[..., Any], *primals: Any) -> tuple[Any, Callable[[Any], Any]]:
    """Return ``torch.func.vjp(function, *primals)``: the value and the map from its cotangent to the primals'."""
    value, pull, *_ = vjp(function, *primals)
    return value, pull
