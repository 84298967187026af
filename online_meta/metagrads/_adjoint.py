"""Differentiate through an inner loop with the adjoint recursion, holding the graph of one step at a time."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from online_meta.batches import count_samples, map_tensors
from online_meta.functional.autodiff import is_transformed, vjp
from online_meta.functional.double_backward import math_attention
from online_meta.functional.model import ModelLoss
from online_meta.functional.randomness import INIT_STEP
from online_meta.inner import (
    Inner,
    count_steps,
    drawing,
    effective_params,
    fast_weights,
    init_carry,
    query_loss,
    slow_weights,
    step,
)
from online_meta.tree import add, scale, zeros
from online_meta.types import Batch, Carry, Meta, MetaGrad, Task, Tensors

Tree = TypeVar("Tree")


def offload_to_host(tree: Tree) -> Callable[[], Tree]:
    """Copy a tree's tensors to pinned host memory; return a function that copies them back to their devices.

    Both copies are asynchronous, in the order of the device's stream, and exact. CPU tensors are not copied. Raises
    ``RuntimeError`` for other tensors under ``torch.func``.
    """
    devices = tree_map(lambda leaf: leaf.device, tree)
    host = tree_map(_to_host, tree)

    def restore() -> Tree:
        found: Tree = tree_map(lambda leaf, device: leaf.to(device, non_blocking=True), host, devices)
        return found

    return restore


def _to_host(tensor: Tensor) -> Tensor:
    if tensor.device.type == "cpu":
        return tensor
    if is_transformed():
        raise RuntimeError(
            "exact(..., offload=True) runs task by task (batching = 'loop'), not under vmap or torch.func"
        )
    pinned = tensor.device.type == "cuda"
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pinned).copy_(tensor, non_blocking=pinned)


Judge = Callable[[Meta, Carry], Tensor]
"""(slow weights and rule, carry) -> the scalar that the meta-gradient differentiates, by default the query loss."""


class Beginning(NamedTuple):
    """Another beginning of the inner loop, in place of the rule's ``start`` and of its first steps.

    Attributes:
        make: (weights and rule) -> the carry after these steps, and a scalar that is added to the loss.
        steps: the number of these steps, at least 0.
    """

    make: Callable[[Meta], tuple[Carry, Tensor]]
    steps: int


StepFn = Callable[[Meta, Carry], Carry]
"""One inner step as a function of (slow weights and rule, carry); the backward pass differentiates it."""


RunStep = Callable[[Meta, Carry, int], tuple[Carry, StepFn]]
"""Run step k without a graph; return the next carry and the ``StepFn`` for the backward pass."""


StoredCarry = Callable[[], Carry]
"""Load a carry that was stored for the backward pass, on the device or in host memory."""


StoreCarry = Callable[[Carry], StoredCarry]


class InnerStep(NamedTuple):
    """Inner step ``k``: its stored initial carry, and the step as a function."""

    k: int
    carry: StoredCarry
    step_fn: StepFn


def differentiate_steps(inner: Inner, support: Batch) -> RunStep:
    """Return the steps of the inner loop on a support set; in each, everything is differentiated."""

    def run_step(slow: Meta, carry: Carry, k: int) -> tuple[Carry, StepFn]:
        def step_fn(slow: Meta, carry: Carry) -> Carry:
            return step(inner, slow, carry, support, k)

        return step_fn(slow, carry), step_fn

    return run_step


def require_step_weights(step_weights: Sequence[float], steps: int) -> list[float]:
    """Return v_0 = 0 and the given v_1..v_K; raise ``ValueError`` unless they are K, not negative and not all 0."""
    if len(step_weights) == steps and all(weight >= 0 for weight in step_weights) and sum(step_weights) > 0:
        return [0.0, *step_weights]
    raise ValueError(
        f"step_weights are {[*step_weights]}: with {steps} inner steps they are {steps} numbers of 0 or more, "
        "one for the loss after each step, and not all 0"
    )


def require_cut(cut: int | None) -> int | None:
    """Return the number of steps between cuts; raise ``ValueError`` if it is below 1."""
    if cut is None or cut >= 1:
        return cut
    raise ValueError(f"cut is {cut}: the gradient passes through at least 1 inner step")


def require_query_chunk(inner: Inner, rows: int | None) -> None:
    """Raise ``ValueError`` if the query loss cannot be differentiated with a graph of ``rows`` samples at a time."""
    if rows is None:
        return
    if rows < 1:
        raise ValueError(f"query_chunk is {rows}: the query set is computed in parts of at least 1 sample")
    if not isinstance(inner.loss, ModelLoss):
        raise ValueError(
            f"query_chunk is {rows}, but the loss is not one of om.model_loss: only the output of these is known, and "
            "can be computed in parts"
        )
    if inner.rule.particles is not None:
        raise ValueError(f"query_chunk is {rows}, but the rule adapts several models at once: leave query_chunk out")
    if inner.loss.mixing:
        raise ValueError(
            f"query_chunk is {rows}, but {', '.join(inner.loss.mixing)} normalises each sample by all others of its "
            "batch, so that the query set cannot be computed in parts: leave query_chunk out, or use GroupNorm or "
            "LayerNorm"
        )


def pull_back(
    inner: Inner,
    meta: Meta,
    task: Task,
    run_step: RunStep,
    *,
    rematerialise: bool = False,
    offload: bool = False,
    weights: Sequence[float] | None = None,
    judge: Judge | None = None,
    cut: int | None = None,
    query_chunk: int | None = None,
    beginning: Beginning | None = None,
) -> MetaGrad:
    """Return the query loss and its gradient by lambda_k = (d step_k / d carry_k)^T lambda_{k+1}.

    ``run_step`` defines the estimator: what a step is, and what is held constant in it. Only the trajectory
    carry_0..carry_K is stored (Maclaurin et al., ICML 2015, recompute it instead), and the graph of one step at a time.
    With ``rematerialise`` the trajectory is stored at every ceil(sqrt(K))-th step and the steps between are recomputed
    (Griewank, 1992), so the memory is of order sqrt(K). With ``offload`` the stored carries are in host memory (see
    ``offload_to_host``). With ``weights`` v_0..v_K the loss is sum_k v_k f(phi_k), and each lambda_k gains
    v_k grad f(phi_k). With a ``judge``, f is judge(slow weights and rule, carry_k) instead of the query loss. With
    ``cut`` = n, the adjoint of phi and state is set to 0 before steps n, 2n, ..., so that each loss reaches back to the
    last of them only (truncated back-propagation: Williams & Peng, 1990). A support set without rows takes no step.
    With a ``query_chunk``, the graph of f holds that many query samples at a time. A ``beginning`` is differentiated in
    one graph.
    """
    with torch.no_grad(), math_attention():  # To select the kernel at each call of the model is slower.
        slow = Meta(slow_weights(inner, meta.weights), meta.rule)
        differentiate = _choose_differentiation(inner, task.query, judge, query_chunk)
        count = count_steps(inner, task.support)
        weights = [0.0] * count + [1.0] if weights is None else weights if count else [sum(weights)]
        begun = min(beginning.steps, count) if beginning else 0
        segment_length = math.isqrt(max(count - 1, 0)) + 1 if rematerialise else max(count, 1)
        store: StoreCarry = offload_to_host if offload else _store_on_device
        segment_starts: list[StoredCarry] = []
        if beginning is None:
            carry = init_carry(inner, meta, task.support)
        else:
            (carry, added), pull_beginning = vjp(beginning.make, meta)
        recorded: list[InnerStep] = []
        for first in range(begun, count, segment_length):
            segment_starts.append(store(carry))
            recorded.clear()
            steps = range(first, min(first + segment_length, count))
            recorded, carry = _record_steps(store, run_step, slow, segment_starts[-1], carry, steps)

        found = differentiate(slow, carry, weights[count])
        for first in reversed(range(begun, count, segment_length)):
            start = segment_starts.pop()
            if first + segment_length < count:
                recorded = _record_steps(store, run_step, slow, start, start(), range(first, first + segment_length))[0]
            while recorded:
                found = _pull_back_step(differentiate, slow, recorded.pop(), found, weights, cut)
        if beginning is None:
            return MetaGrad(found.loss, pull_back_through_init(inner, meta, task, found.total, found.adjoint))
        (share,) = pull_beginning((found.adjoint, torch.ones_like(added)))
        return MetaGrad(found.loss + added, _add_shares(meta, found.total, share))


class _Gradient(NamedTuple):
    """A weighted loss and its gradients with respect to (slow weights, rule) and to the carry."""

    loss: Tensor
    total: Meta
    adjoint: Carry


def _pull_back_step(
    differentiate: "_Differentiate",
    slow: Meta,
    inner_step: InnerStep,
    after: _Gradient,
    weights: Sequence[float],
    cut: int | None,
) -> _Gradient:
    """Pull the gradient after an inner step back to the carry before it, and add that of the loss there."""
    k, stored, step_fn = inner_step
    carry = stored()
    pull = vjp(step_fn, slow, carry)[1]  # Drop the step's value: it is as large as all fast weights.
    share, adjoint = pull(after.adjoint)
    if cut is not None and k and k % cut == 0:
        adjoint = zeros(adjoint)
    found = _Gradient(after.loss, add(after.total, share), adjoint)
    return add(found, differentiate(slow, carry, weights[k])) if weights[k] else found


_Differentiate = Callable[[Meta, Carry, float], _Gradient]
"""(slow weights and rule, carry, weight of the loss) -> the weighted loss and its gradients."""


def _choose_differentiation(inner: Inner, query: Batch, judge: Judge | None, rows: int | None) -> _Differentiate:
    if judge is not None:
        return partial(_differentiate, judge)
    if rows is not None and rows < count_samples(query):
        return partial(_differentiate_in_chunks, inner, query, rows)
    return partial(_differentiate, lambda slow, carry: query_loss(inner, slow, carry.phi, query))


def _differentiate(judge: Judge, slow: Meta, carry: Carry, weight: float) -> _Gradient:
    loss, pull = vjp(judge, slow, carry)
    result = _Gradient(loss, *pull(torch.ones_like(loss)))
    return result if weight == 1.0 else scale(result, weight)


def _differentiate_in_chunks(
    inner: Inner, query: Batch, rows: int, slow: Meta, carry: Carry, weight: float
) -> _Gradient:
    """Differentiate the query loss with a graph of ``rows`` samples at a time.

    The outputs of all samples come first. The loss and its gradient by the outputs are those of the whole set, so any
    loss is exact. Each chunk is then computed again, and pulls its part of that gradient back. The graph of the last
    chunk is kept from the first time.
    """
    loss = inner.loss
    assert isinstance(loss, ModelLoss)
    *firsts, last = [
        map_tensors(lambda tensor, at=at: tensor[at : at + rows], query.x)
        for at in range(0, count_samples(query), rows)
    ]
    with drawing(inner, query, INIT_STEP, "query"):
        params, pull_view = vjp(lambda slow, carry: effective_params(inner, slow, carry.phi), slow, carry)
        loss.require_separate_samples(params, query)
        outputs = [loss.call_training(params, x) for x in firsts]
        output, pull_last = vjp(lambda params: loss.call_training(params, last), params)
    value, pull_loss = vjp(
        lambda output: loss.judge(output, query), map_tensors(lambda *parts: torch.cat(parts), *outputs, output)
    )
    (cotangent,) = pull_loss(torch.full_like(value, weight))
    (total,) = pull_last(_take_rows(cotangent, len(firsts), rows))
    with drawing(inner, query, INIT_STEP, "query"):  # the same numbers again
        params = effective_params(inner, slow, carry.phi)
        for k, x in enumerate(firsts):
            pull = vjp(lambda params, x=x: loss.call_training(params, x), params)[1]
            total = add(total, pull(_take_rows(cotangent, k, rows))[0])
    return _Gradient(value * weight, *pull_view(total))


def _take_rows(cotangent: Tensors, k: int, rows: int) -> Tensors:
    return map_tensors(lambda tensor: tensor[k * rows : (k + 1) * rows], cotangent)


def _store_on_device(carry: Carry) -> StoredCarry:
    return lambda: carry


def _record_steps(
    store: StoreCarry, run_step: RunStep, slow: Meta, start: StoredCarry, carry: Carry, steps: range
) -> tuple[list[InnerStep], Carry]:
    """Run ``steps`` from ``carry``, already stored as ``start``, without a graph; return them and the last carry."""
    recorded = []
    for k in steps:
        next_carry, step_fn = run_step(slow, carry, k)
        recorded.append(InnerStep(k, start if k == steps.start else store(carry), step_fn))
        carry = next_carry
    return recorded, carry


def pull_back_through_init(inner: Inner, meta: Meta, task: Task, total: Meta, adjoint: Carry) -> Meta:
    """Pull the first carry's adjoint back through the rule's ``start`` to the weights and the rule; add ``total``."""
    # A head that is made of the support set depends on the weights that do not adapt, too.
    given = Meta(meta.weights if inner.rule.head else fast_weights(inner, meta.weights), meta.rule)
    _, pull = vjp(lambda given: init_carry(inner, given, task.support), given)
    (share,) = pull(adjoint)
    return _add_shares(meta, total, share)


def _add_shares(meta: Meta, total: Meta, share: Meta) -> Meta:
    """Return the sum of two gradients, each of some of the weights of ``meta`` and of the rule."""
    both = total.weights.keys() & share.weights.keys()
    weights = {**total.weights, **share.weights, **{name: total.weights[name] + share.weights[name] for name in both}}
    return Meta({name: weights[name] for name in meta.weights}, add(total.rule, share.rule))
