"""Check on a few small tasks whether a model is safe to meta-learn, and explain each problem to the user."""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from online_meta.batches import map_tensors, name_tensors, sum_weights
from online_meta.functional.autodiff import outside_inference_mode
from online_meta.functional.guard import PURE
from online_meta.functional.intent import Intent
from online_meta.functional.model import ModelLoss, find_misfits, find_unfaithful_outputs
from online_meta.functional.randomness import INIT_STEP
from online_meta.functional.stateless import widen_once
from online_meta.inner import Inner, choose_start, drawing, query_loss, run_inner_loop, support_loss
from online_meta.metagrads.exact import exact
from online_meta.preflight.diagnosis import (
    explain_error,
    explain_half_precision,
    explain_randomness,
    explain_stateful_layers,
    explain_unknown_parameters,
    explain_wrong_derivative,
    summarize_error,
)
from online_meta.preflight.gradcheck import (
    PRECISIONS,
    Precision,
    Verdict,
    autograd_gradient,
    check_derivative,
    check_gradient,
    check_second_derivative,
    cut_out,
    directional_derivative,
    find_wrong_layer,
    flatten,
    hold_rows,
    isolate_call,
    precision_of,
)
from online_meta.preflight.layer_trace import LayerCall, LayerTrace, trace_layers
from online_meta.registry import nearest
from online_meta.tree import to_float64
from online_meta.types import Batch, Carry, Meta, MetaGrad, MetaGradient, Params, Seen, Task

MAX_SAMPLES = 8
MAX_TASKS = 2
MAX_STEPS = 2


@dataclass(frozen=True)
class Probe:
    """The inner loop, meta-parameters and tasks that the checks run on, reduced to a few samples and steps."""

    inner: Inner
    meta: Meta
    tasks: tuple[Task, ...]
    intent: Intent = Intent()

    def held_loss(self, weights: Params) -> Tensor:
        """Return the loss on the first support set as a function in which constant rows of the weights stay."""
        return hold_rows(self.loss, self.intent.rows, self.meta.weights)(weights)

    def loss(self, weights: Params, batch: Batch | None = None) -> Tensor:
        """Return the loss of ``weights`` on a batch (by default the first support set), seeded like a query loss."""
        return query_loss(self.inner, Meta(weights, self.meta.rule), {}, batch or self.tasks[0].support)


@dataclass
class ProbeResult:
    """How a trial went: what was ``trace``, the ``error`` that ended it, and what is ``modified`` that was given."""

    trace: LayerTrace
    error: Exception | None = None
    modified: list[str] = field(default_factory=list)


def make_probe(inner: Inner, meta: Meta, tasks: Sequence[Task], intent: Intent) -> Probe:
    """Make a probe of the first samples of the first tasks; it copies all tensors that the model could write to."""

    def first(task: Task) -> Task:
        return map_tensors(lambda tensor: tensor[:MAX_SAMPLES].detach().clone(), task)

    small = tuple(first(task) for task in tasks[:MAX_TASKS])
    copied: Meta = map_tensors(lambda leaf: leaf.detach().clone(), meta)
    return Probe(replace(inner, steps=min(inner.steps, MAX_STEPS)), copied, small, intent)


def in_float64(probe: Probe) -> Probe:
    """Return the probe with all floating-point tensors in float64."""
    meta, tasks = to_float64((probe.meta, probe.tasks))
    return replace(probe, meta=meta, tasks=tasks)


def run_probe(probe: Probe, second: bool) -> ProbeResult:
    """Differentiate the support loss once, or twice if ``second``; record errors instead of raising them."""
    leaves = {name: weight.clone().requires_grad_() for name, weight in probe.meta.weights.items()}
    original = probe.tasks[0].support
    support = map_tensors(torch.clone, original)
    probe = replace(probe, tasks=(probe.tasks[0]._replace(support=support),))
    with trace_layers() as trace, torch.enable_grad():
        result = ProbeResult(trace)
        try:
            loss = probe.loss(leaves)
            trace.dtypes.add(loss.dtype)
            trace.in_backward = True
            _differentiate(loss, leaves, second)
        except Exception as error:  # A user's model may raise anything; the error is a result of the check.
            result.error = error
    pairs = {f"the weight {name!r}": (leaf, probe.meta.weights[name]) for name, leaf in leaves.items()}
    for name, part in (("its input x", "x"), ("the targets y", "y")):
        before = name_tensors(name, getattr(original, part))
        pairs |= {name: (now, before[name]) for name, now in name_tensors(name, getattr(support, part)).items()}
    result.modified += [name for name, (now, before) in pairs.items() if not torch.equal(now, before)]
    result.modified += [f"the buffer {name!r}" for name in trace.modified]
    return result


def _differentiate(loss: Tensor, leaves: Params, second: bool) -> None:
    if not loss.requires_grad:
        return
    tensors = [*leaves.values()]
    grads = torch.autograd.grad(loss, tensors, create_graph=second, allow_unused=True, materialize_grads=True)
    if second:
        dot = torch.stack([(grad * grad.conj()).real.sum() for grad in grads]).sum()
        if dot.requires_grad:
            torch.autograd.grad(dot, tensors, allow_unused=True)


def find_impurities(probe: Probe, result: ProbeResult) -> Iterator[str]:
    """Yield a sentence if the model writes to its inputs, or if repeated calls give different losses."""
    for name in dict.fromkeys(result.modified):
        yield (f"forward edits {name}, and {PURE}")
    if result.modified or result.error is not None:
        return
    if not _is_repeatable(lambda: probe.loss(probe.meta.weights)):
        yield explain_randomness(result.trace, _is_repeatable(lambda: _seeded_loss(probe)))


def _seeded_loss(probe: Probe) -> Tensor:
    torch.manual_seed(0)
    return probe.loss(probe.meta.weights)


def _is_repeatable(loss: Callable[[], Tensor]) -> bool:
    """Return whether a few calls agree up to rounding; the order of sums on an accelerator can vary."""
    first, *others = (loss() for _ in range(3))
    tolerance = 1e3 * torch.finfo(first.dtype).eps
    return all(torch.allclose(first, other, rtol=tolerance, atol=0, equal_nan=True) for other in others)


def unrolled(inner: Inner, meta: Meta, task: Task) -> MetaGrad:
    """Return the query loss and d f(phi_K) / d meta by plain autograd through all ``inner.steps`` at once.

    It implements the equations of ``Inner`` without the adjoint recursion, as an independent reference. The memory
    grows with the number of steps. A parameter that the loss does not depend on gets zeros.
    """
    with torch.enable_grad():
        leaves = Meta(*({name: value.detach().requires_grad_() for name, value in part.items()} for part in meta))
        loss = query_loss(inner, leaves, _adapted(inner, leaves, task.support), task.query)
        tensors = [*leaves.weights.values(), *leaves.rule.values()]
        if not loss.requires_grad:
            grads = iter([torch.zeros_like(tensor) for tensor in tensors])
        else:
            grads = iter(torch.autograd.grad(loss, tensors, allow_unused=True, materialize_grads=True))
    return MetaGrad(loss.detach(), Meta(*({name: next(grads) for name in part} for part in leaves)))


def _adapted(inner: Inner, meta: Meta, support: Batch) -> Params:
    """Return phi_K with its whole autograd graph."""
    with drawing(inner, support, INIT_STEP, "begin"):
        carry = inner.rule.start(meta.rule, choose_start(inner, meta, support), support)
    carry = Carry({name: value.clone() for name, value in carry.phi.items()}, carry.state)  # A head depends on others.
    for k in range(inner.steps):
        # Values without a graph, e.g. CAVIA's zeros, become leaves, because the loop differentiates by them.
        named = {n: value if value.requires_grad else value.detach().requires_grad_() for n, value in carry.phi.items()}
        carry = Carry(named, carry.state)
        loss = support_loss(inner, meta, named, support, k)
        seen = named if inner.rule.sees == "gradient" else {}
        phi = [*seen.values()]
        if phi and loss.requires_grad:
            grads = torch.autograd.grad(loss, phi, create_graph=True, allow_unused=True, materialize_grads=True)
        else:
            grads = tuple(torch.zeros_like(value) for value in phi)
        with drawing(inner, support, k + 1, "update"):
            whole = Seen(loss, dict(zip(seen, grads, strict=True)), sum_weights(support))
            carry = inner.rule.update(meta.rule, carry, whole, k)
    return carry.phi


PADDING = "the padding row of"


NO_DEPENDENCE = "the loss depends on none of the weights"


ATTENTION = ("scaled_dot_product_attention", "multi_head_attention_forward", "_native_multi_head_attention")


class Preflight(NamedTuple):
    """The result of the checks: ``problems`` that must be fixed (empty if the model is safe), and ``notes``."""

    problems: tuple[str, ...]
    notes: tuple[str, ...]


@outside_inference_mode
def preflight(
    inner: Inner,
    meta: Meta,
    tasks: Sequence[Task],
    *,
    gradient: MetaGradient | None = None,
    second: bool = True,
    remarks: bool = True,
    surrogate: Sequence[str] = (),
    frozen_rows: Mapping[str, Sequence[int]] | None = None,
) -> Preflight:
    """Check whether this loss and rule can be differentiated correctly; return problems and notes.

    The checks use a few samples of a few tasks, at most two inner steps, and float64 if the model supports it. They
    compare the output of a loss of ``om.model_loss`` with that of the module, in its own dtypes and modes, and the
    shapes of output and targets with what the loss needs. They compare the gradient and second derivative of the
    support loss, and the gradient of the adapted query loss, with central differences, and ``om.exact`` with the inner
    loop unrolled in one graph. A failure is then located layer by layer. Torch's random generators are left unchanged.

    Args:
        inner: the inner loop.
        meta: the meta-parameters to check at.
        tasks: at least one task; the first two are used.
        gradient: an estimator to check as well: its results must be finite and repeatable. None for no such check.
        second: whether wrong second derivatives are problems; use False for estimators that do not need them
            (``first_order``, ``reptile``), which turns them into notes.
        remarks: whether to run the checks that only produce notes; they take about a second longer.
        surrogate: globs of layers whose gradient is not their slope on purpose, in addition to those that the loss
            declares (see ``om.model_loss``). Everything around them is checked.
        frozen_rows: by name of a weight, further rows whose gradient must be zero.

    Returns:
        The problems, none if the model is safe, and the notes.

    Raises:
        ValueError: if there is no task.
    """
    if not tasks:
        raise ValueError("there is no task to check the model on: give at least one")
    devices = sorted({leaf.device.index or 0 for leaf in tree_leaves((meta, [*tasks])) if leaf.is_cuda})
    found = _Diagnosis([], [])
    declared: Intent = getattr(inner.loss, "intent", Intent())
    intent = declared._replace(
        surrogate=(*declared.surrogate, *surrogate),
        frozen_rows={**declared.frozen_rows, **{name: tuple(rows) for name, rows in (frozen_rows or {}).items()}},
    )
    with torch.random.fork_rng(devices), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch repeats these warnings in training
        with widen_once(inner.loss, tasks[0].support.x):
            _examine(make_probe(inner, meta, tasks, intent), found, gradient, second, remarks)
    return Preflight(tuple(dict.fromkeys(found.problems)), tuple(dict.fromkeys(found.notes)))


class _Diagnosis(NamedTuple):
    problems: list[str]
    notes: list[str]


def _examine(original: Probe, found: _Diagnosis, gradient: MetaGradient | None, second: bool, remarks: bool) -> None:
    """Run the checks in order; skip those that depend on one that failed."""
    # Check layers without recomputation, which would call them again in the backward pass.
    loss = getattr(original.inner.loss, "without_recompute", None) or original.inner.loss
    unguarded = replace(loss, guards=None) if isinstance(loss, ModelLoss) else loss
    probe, result = _first_run(replace(original, inner=replace(original.inner, loss=unguarded)), found, second)
    found.problems.extend(explain_stateful_layers(result.trace))
    if not found.problems:
        found.problems.extend(_find_misfits(original, result.trace))
    if not found.problems:
        found.problems.extend(find_impurities(probe, result))
    if result.error is not None and not found.problems:
        where = find_wrong_layer(result.trace, check_second_derivative if second else check_gradient, probe.intent)
        found.problems.append(explain_error(result.trace, result.error, where))
    if not found.problems:
        found.problems.extend(find_unfaithful_outputs(original.inner.loss, original.meta.weights, _batches(original)))
    if not found.problems:
        _check_intent(probe, found, result)
    if not found.problems:
        _check_derivatives(probe, found, result, second)
    if second and not found.problems:
        _check_exact(probe, original.inner, found, result)
    if gradient is not None and not found.problems:
        found.problems.extend(_check_estimator(original, gradient))
    if remarks and not found.problems:
        found.notes.extend(_find_notes(probe, original.inner, result))


def _batches(probe: Probe) -> list[Batch]:
    return [batch for task in probe.tasks for batch in task]


def _find_misfits(original: Probe, trace: LayerTrace) -> Iterator[str]:
    """Yield a sentence if output and targets of a task do not fit the loss."""
    loss = original.inner.loss
    yield from find_misfits(loss, original.meta.weights, _batches(original))
    # Of a loss of the user's own, only torch's warning is known.
    if not isinstance(loss, ModelLoss) and any("different to the input size" in message for message in trace.warnings):
        yield "the loss compares an output and targets of other shapes, by broadcasting: give them the same shape"


def _check_intent(probe: Probe, found: _Diagnosis, result: ProbeResult) -> None:
    """Verify what is declared: rows without a gradient, and layers that exist."""
    intent, layers = probe.intent, result.trace.layers
    for glob in intent.surrogate:
        if not any(fnmatchcase(name, glob) for name in layers):
            found.problems.append(f"surrogate = {glob!r} matches none of the model's layers: {nearest(glob, layers)}")
    grads = _gradients(probe)
    for name, rows in intent.frozen_rows.items():
        if name not in grads:
            found.problems.append(f"frozen_rows: {name!r} is none of the weights: {nearest(name, grads)}")
        elif bool(grads[name][[*rows]].any()):
            found.problems.append(f"frozen_rows: the rows {[*rows]} of {name} have a gradient, so they are learned")
    learned = [name for name, rows in intent.padding.items() if name in grads and bool(grads[name][[*rows]].any())]
    for name in learned:
        found.notes.append(f"{PADDING} {name} has a gradient all the same: another layer uses this weight, too")
    surrogates = [name for name in layers if intent.is_surrogate(name) and not intent.is_surrogate(_above(name))]
    if surrogates:
        found.notes.append(f"the gradient of {', '.join(map(repr, surrogates))} is a surrogate; the rest is checked")
    for call in result.trace.calls:
        if call.name in surrogates and _is_slope(call):
            found.notes.append(f"the gradient of {result.trace.describe_layer(call.name)} is its slope: no surrogate")


def _above(name: str) -> str:
    return name.rpartition(".")[0] or "."


def _is_slope(call: LayerCall) -> bool:
    objective, at = isolate_call(call)
    try:
        return bool(at) and all(check(objective, at) == "right" for check in (check_gradient, check_second_derivative))
    except Exception:  # An operation with one derivative, or one too coarse to compare.
        return False


def _first_run(original: Probe, found: _Diagnosis, second: bool) -> tuple[Probe, ProbeResult]:
    """Run the probe in float64, or in its own dtype if the model does not support float64."""
    probe = in_float64(original)
    result = run_probe(probe, second)
    low_precision = {str(dtype) for dtype in result.trace.dtypes if dtype.is_floating_point} - {str(torch.float64)}
    if result.error is None and not low_precision:
        return probe, result
    again = run_probe(original, second)
    if again.error is None:
        why = (
            summarize_error(result.error) if result.error is not None else f"it uses {', '.join(sorted(low_precision))}"
        )
        found.notes.append(f"the model does not compute in float64 ({why}): its derivatives are compared more loosely")
    return original, again


def _precision(probe: Probe, trace: LayerTrace) -> Precision | None:
    """Return the precision that the model computes in; None if it is too coarse for comparisons."""
    return precision_of({*(value.dtype for value in probe.meta.weights.values()), *trace.dtypes})


def _check_derivatives(probe: Probe, found: _Diagnosis, result: ProbeResult, second: bool) -> None:
    """Compare the first and second derivatives of the support loss with central differences."""
    trace, intent, weights = result.trace, probe.intent, probe.meta.weights
    if _precision(probe, trace) is None:
        found.notes.append("the model computes too coarsely for its derivatives to be compared with differences")
        return
    parts, at = cut_out(probe.held_loss, weights, intent.is_surrogate)
    verdicts = [check_gradient(part, at) for part in parts]
    if "wrong" in verdicts:
        name = find_wrong_layer(trace, check_gradient, intent)
        found.problems.append(explain_wrong_derivative(trace, name, "gradient"))
        return
    messages = found.problems if second else found.notes
    try:
        verdicts += [check_second_derivative(part, at) for part in parts]
    except Exception as error:  # Torch has many ways of saying that an operation has one derivative only.
        messages.append(explain_error(trace, error, find_wrong_layer(trace, check_second_derivative, intent)))
        return
    if "wrong" in verdicts:
        name = find_wrong_layer(trace, check_second_derivative, intent)
        messages.append(explain_wrong_derivative(trace, name, "second derivative"))
    if "unclear" in verdicts:
        found.notes.append(
            "its derivatives could not be compared with central differences: the loss has kinks everywhere, or is not "
            "computed precisely enough"
        )
    if not any(bool(grad.any()) for grad in _gradients(probe).values()):
        found.problems.append(NO_DEPENDENCE)


def _check_exact(probe: Probe, inner: Inner, found: _Diagnosis, result: ProbeResult) -> None:
    """Compare ``exact`` with the unrolled loop, and with central differences of the adapted query loss."""
    precision = _precision(probe, result.trace)
    if precision is None:
        return
    gradient = exact(inner)
    for task in probe.tasks:
        ours, theirs = (
            flatten(_flatten_meta(estimate(probe.meta, task).grads)) for estimate in (gradient, _unrolled(probe))
        )
        error, size = float((ours - theirs).norm()), float(theirs.norm())
        if not error <= precision.tolerance * size:
            found.problems.append(
                f"the exact meta-gradient is off by {error:.1e} of {size:.1e} from that of the inner loop unrolled in "
                "one graph: the loss or the inner rule is not a function of what it is given"
            )
            return
    task, intent = probe.tasks[0], probe.intent
    if any(map(intent.is_surrogate, result.trace.layers)) or any(note.startswith(PADDING) for note in found.notes):
        return  # The adapted loss depends on gradients that are no slopes, and so has no slope to compare with.

    def adapted_query_loss(at: Params) -> Tensor:
        meta = _unflatten_meta(at)
        return query_loss(probe.inner, meta, run_inner_loop(probe.inner, meta, task.support).phi, task.query)

    at, grads = _flatten_meta(probe.meta), _flatten_meta(gradient(probe.meta, task).grads)
    rows = {f"w{name}": rows for name, rows in intent.rows.items() if name in probe.meta.weights}
    for name, constant in rows.items():
        grads[name][[*constant]] = 0
    verdict: Verdict = check_derivative(
        hold_rows(adapted_query_loss, rows, at), directional_derivative(grads), at, precision
    )
    if verdict == "wrong":
        # Of many kinks close together, float32's wide differences cannot tell what is hidden: no reason to refuse.
        fine = precision is PRECISIONS[torch.float64]
        hides = "the inner rule hides something from autograd (.detach(), torch.no_grad())"
        (found.problems if fine else found.notes).append(
            "the exact meta-gradient is not the slope of the adapted query loss (by central differences), though the "
            f"loss alone is right: {hides if fine else f'{hides}, or float32 is too coarse for its kinks'}"
        )


def _unrolled(probe: Probe) -> MetaGradient:
    return lambda meta, task: unrolled(probe.inner, meta, task)


def _flatten_meta(meta: Meta) -> Params:
    """Flatten weights and rule into one dict; the first letter of a name, w or r, says which it is."""
    return {part + name: value for part, tensors in zip("wr", meta, strict=True) for name, value in tensors.items()}


def _unflatten_meta(at: Params) -> Meta:
    return Meta(*({name[1:]: value for name, value in at.items() if name[0] == part} for part in "wr"))


def _check_estimator(original: Probe, gradient: MetaGradient) -> Iterator[str]:
    """Yield a sentence if the estimator's result is not finite, or if repeated calls give different results."""
    for task in original.tasks:
        first, again = gradient(original.meta, task), gradient(original.meta, task)
        nonfinite = [name for name, grad in first.grads.weights.items() if not bool(torch.isfinite(grad).all())]
        if nonfinite or not bool(torch.isfinite(first.loss)):
            where = f" for {', '.join(nonfinite)}" if nonfinite else ""
            yield f"the meta-gradient{where} is not finite where the loss is {float(first.loss):.3g}: take a smaller lr"
        pairs = zip(tree_leaves(first), tree_leaves(again), strict=True)
        if first.loss.device.type == "cpu" and not all(torch.equal(a, b) for a, b in pairs):
            yield "repeated calls give different meta-gradients: a round must be repeatable"


def _find_notes(probe: Probe, inner: Inner, result: ProbeResult) -> Iterator[str]:
    """Yield sentences about facts that are not problems but useful to know."""
    unused = [name for name, grad in _gradients(probe).items() if not bool(grad.any())]
    if unused:
        yield f"at these weights the loss of the tasks tried has no gradient for {', '.join(unused)}"
    yield from explain_unknown_parameters(result.trace)
    tensors = getattr(inner.loss, "tensors", None)
    yield from explain_half_precision({} if tensors is None else tensors.learned)
    if result.trace.operations_by_layer(ATTENTION.__contains__):
        yield "attention runs by torch's math kernel, the only one that can be differentiated twice"
    try:
        batch = probe.tasks[0].support
        pair = map_tensors(lambda tensor: torch.stack([tensor, tensor]), batch)
        torch.func.vmap(torch.func.grad(inner.loss), (None, 0), randomness="different")(probe.meta.weights, pair)
    except Exception as error:  # A model that vmap does not support may raise anything.
        yield f"the model does not run for many tasks at once by vmap ({summarize_error(error)}): the task loop is used"


def _gradients(probe: Probe) -> Params:
    """Return the sum of the absolute gradients of the loss on every set of every task, by weight."""
    total = {name: torch.zeros_like(weight) for name, weight in probe.meta.weights.items()}
    for task in probe.tasks:
        for batch in task:
            found = autograd_gradient(partial(probe.loss, batch=batch), probe.meta.weights)
            total = {name: value + found[name].abs() for name, value in total.items()}
    return total
