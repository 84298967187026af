"""Differentiate through an inner loop backwards, one step's graph at a time."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from online_meta.differentiate import vjp
from online_meta.inner import Inner, begin, fast_weights, query_loss, slow_weights
from online_meta.offload import laid_aside
from online_meta.tree import add, scale
from online_meta.types import Carry, Meta, MetaGrad, Task

Move = Callable[[Meta, Carry], Carry]
"""One inner step as a function of (slow weights and rule, carry), to be differentiated going back."""

Play = Callable[[Meta, Carry, int], tuple[Carry, Move]]
"""Make step k without a graph; return the next carry and the ``Move`` that going back differentiates."""

Kept = Callable[[], Carry]
"""A point of the trajectory that is kept for going back, wherever it lies."""

Keep = Callable[[Carry], Kept]


class Played(NamedTuple):
    """Inner step ``k``: what gives back where it began, and the move that it made."""

    k: int
    carry: Kept
    move: Move


def pull_back(
    inner: Inner,
    meta: Meta,
    task: Task,
    play: Play,
    *,
    rematerialise: bool = False,
    offload: bool = False,
    weights: Sequence[float] | None = None,
) -> MetaGrad:
    """Return the query loss and its gradient by lambda_k = (d move_k / d carry_k)^T lambda_{k+1}.

    Each estimator is a choice of ``play``: what it calls the step, and what it holds constant in it.
    Only the trajectory carry_0..carry_K is kept (Maclaurin et al., ICML 2015, recompute it instead); the memory of
    a graph is that of one step, whatever ``inner.steps`` is. With ``rematerialise`` the trajectory is kept at every
    ceil(sqrt(K))-th step and the stretches between are played again (Griewank, 1992): of order sqrt(K).
    With ``offload`` what is kept of it lies in the memory of the host (see ``laid_aside``).
    With ``weights`` v_0..v_K the loss is sum_k v_k f(phi_k), and lambda_k gains v_k grad f(phi_k) on its way.
    """
    with torch.no_grad():
        held = Meta(slow_weights(inner, meta.weights), meta.rule)
        weights = [0.0] * inner.steps + [1.0] if weights is None else weights
        stretch = math.isqrt(max(inner.steps - 1, 0)) + 1 if rematerialise else max(inner.steps, 1)
        keep: Keep = laid_aside if offload else _kept
        starts: list[Kept] = []
        carry = begin(inner, meta, task.support)
        played: list[Played] = []
        for first in range(0, inner.steps, stretch):
            starts.append(keep(carry))
            played.clear()
            steps = range(first, min(first + stretch, inner.steps))
            played, carry = _advance(keep, play, held, starts[-1], carry, steps)

        loss, total, adjoint = _judge(inner, held, carry, task, weights[inner.steps])
        for first in reversed(range(0, inner.steps, stretch)):
            start = starts.pop()
            if first + stretch < inner.steps:
                played = _advance(keep, play, held, start, start(), range(first, first + stretch))[0]
            while played:
                k, kept, move = played.pop()
                carry = kept()
                pull = vjp(move, held, carry)[1]  # What the move led to is not kept: it is as large as all that adapts.
                share, adjoint = pull(adjoint)
                total = add(total, share)
                if weights[k]:
                    here = _judge(inner, held, carry, task, weights[k])
                    loss, total, adjoint = add(_Judged(loss, total, adjoint), here)
        return MetaGrad(loss, through_begin(inner, meta, task, total, adjoint))


class _Judged(NamedTuple):
    """A weighted query loss and its gradients with respect to what is held and to the carry."""

    loss: Tensor
    total: Meta
    adjoint: Carry


def _kept(carry: Carry) -> Kept:
    return lambda: carry


def _advance(keep: Keep, play: Play, held: Meta, start: Kept, carry: Carry, steps: range) -> tuple[list[Played], Carry]:
    """Make some steps from ``carry``, kept as ``start``, without a graph; return them and where they led."""
    played = []
    for k in steps:
        following, move = play(held, carry, k)
        played.append(Played(k, start if k == steps.start else keep(carry), move))
        carry = following
    return played, carry


def _judge(inner: Inner, held: Meta, carry: Carry, task: Task, weight: float) -> _Judged:
    def judge(held: Meta, carry: Carry) -> Tensor:
        return query_loss(inner, held, carry.phi, task.query)

    loss, pull = vjp(judge, held, carry)
    judged = _Judged(loss, *pull(torch.ones_like(loss)))
    return judged if weight == 1.0 else scale(judged, weight)


def through_begin(inner: Inner, meta: Meta, task: Task, total: Meta, adjoint: Carry) -> Meta:
    """Pull the first carry's adjoint back to the weights and to what made the rule's state; add it to ``total``."""
    fast = Meta(fast_weights(inner, meta.weights), meta.rule)
    _, pull = vjp(lambda fast: begin(inner, fast, task.support), fast)
    (share,) = pull(adjoint)
    weights = {**total.weights, **share.weights}
    return Meta({name: weights[name] for name in meta.weights}, add(total.rule, share.rule))
