"""Is this model safe to meta-learn? Asked of a few small tasks, answered in sentences that a user can act on."""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from online_meta.derivatives import curvature_verdict, derivative, find_wrong, flat, slope_verdict
from online_meta.explain import explain_error, explain_wrong, running_statistics, summed_up
from online_meta.inner import Inner, finish, query_loss
from online_meta.metagrads.exact import exact
from online_meta.slopes import PRECISIONS, Verdict, judge, slope
from online_meta.trial import Run, Trial, begin_trial, in_float64, run, what_changes
from online_meta.types import Meta, MetaGradient, Params, Task
from online_meta.unrolled import unrolled

DEAF = "the loss depends on none of the weights"
ATTENTION = ("scaled_dot_product_attention", "multi_head_attention_forward", "_native_multi_head_attention")


class Preflight(NamedTuple):
    """What was found: ``problems`` that must be put right (none is good), and ``notes`` worth knowing."""

    problems: tuple[str, ...]
    notes: tuple[str, ...]


def preflight(
    inner: Inner,
    meta: Meta,
    tasks: Sequence[Task],
    *,
    gradient: MetaGradient | None = None,
    second: bool = True,
    remarks: bool = True,
) -> Preflight:
    """Return what is wrong with differentiating this loss and rule, and what is worth knowing.

    In float64 where the model can, on a few samples of a few of ``tasks`` and at most two inner steps: the gradient
    and second derivative of the support loss, and the slope of the adapted query loss, are held against central
    differences; ``om.exact`` against the inner loop unrolled in one graph. What fails or disagrees is looked for layer
    by layer. ``gradient`` is an estimator to be asked as well: what it gives must be finite, and the same when asked
    again. Where that takes no second derivatives (first_order, reptile), ``second=False`` makes notes of what is wrong
    with those. ``remarks=False`` leaves out what is looked at for a note only: a second less, in which torch imports
    its compiler for ``vmap``. Torch's random numbers stay as they are. Raises ``ValueError`` when there is no task.
    """
    if not tasks:
        raise ValueError("there is no task to try the model on: give one or more")
    devices = sorted({leaf.device.index or 0 for leaf in tree_leaves((meta, [*tasks])) if leaf.is_cuda})
    found = _Found([], [])
    with torch.random.fork_rng(devices), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # What torch warns of here, it warns of again when it is run in earnest.
        _examine(begin_trial(inner, meta, tasks), found, gradient, second, remarks)
    return Preflight(tuple(dict.fromkeys(found.problems)), tuple(dict.fromkeys(found.notes)))


class _Found(NamedTuple):
    problems: list[str]
    notes: list[str]


def _examine(given: Trial, found: _Found, gradient: MetaGradient | None, second: bool, remarks: bool) -> None:
    """Look at one thing after the other; what depends on one that is wrong is left out."""
    # Layers are looked at as they are without recomputation, which calls them again going back.
    keeping = getattr(given.inner.loss, "keeping", None) or given.inner.loss
    trial, went = _start(replace(given, inner=replace(given.inner, loss=keeping)), found, second)
    found.problems.extend(running_statistics(went.seen))
    if not found.problems:
        found.problems.extend(what_changes(trial, went))
    if went.error is not None and not found.problems:
        found.problems.append(explain_error(went.seen, went.error))
    if not found.problems:
        _check_derivatives(trial, found, went, second)
    if second and not found.problems:
        _check_exact(trial, given.inner, found)
    if gradient is not None and not found.problems:
        found.problems.extend(_ask(given, gradient))
    if remarks and not found.problems:
        found.notes.extend(_remarks(trial, given.inner, went))


def _start(given: Trial, found: _Found, second: bool) -> tuple[Trial, Run]:
    """Run the trial in float64, or as it was given where the model takes no float64."""
    trial = in_float64(given)
    went = run(trial, second)
    coarse = {str(dtype) for dtype in went.seen.dtypes if dtype.is_floating_point} - {str(torch.float64)}
    if went.error is None and not coarse:
        return trial, went
    again = run(given, second)
    if again.error is None:
        why = summed_up(went.error) if went.error is not None else f"it uses {', '.join(sorted(coarse))}"
        found.notes.append(f"the model does not compute in float64 ({why}): its derivatives are compared more loosely")
    return given, again


def _check_derivatives(trial: Trial, found: _Found, went: Run, second: bool) -> None:
    """Hold the first and second derivatives of the support loss against central differences."""
    weights = trial.meta.weights
    if next(iter(weights.values())).dtype not in PRECISIONS:
        found.notes.append("the model computes too coarsely for its derivatives to be compared with differences")
        return
    verdict = slope_verdict(trial.loss, weights)
    if verdict == "wrong":
        found.problems.append(explain_wrong(went.seen, find_wrong(went.seen, slope_verdict), "gradient"))
        return
    told = found.problems if second else found.notes
    try:
        verdicts = (verdict, curvature_verdict(trial.loss, weights))
    except Exception as error:  # Torch has many ways of saying that an operation has one derivative only.
        told.append(explain_error(went.seen, error))
        return
    if "wrong" in verdicts:
        told.append(explain_wrong(went.seen, find_wrong(went.seen, curvature_verdict), "second derivative"))
    if "unclear" in verdicts:
        found.notes.append(
            "its derivatives could not be compared with central differences: the loss has kinks everywhere, or is not "
            "computed precisely enough"
        )
    if not any(bool(grad.any()) for grad in _gradients(trial).values()):
        found.problems.append(DEAF)


def _check_exact(trial: Trial, inner: Inner, found: _Found) -> None:
    """Hold ``exact`` of ``inner`` against the unrolled loop, and against the slope of the adapted query loss."""
    precision = PRECISIONS.get(next(iter(trial.meta.weights.values())).dtype)
    if precision is None:
        return
    gradient = exact(inner)
    for task in trial.tasks:
        ours, theirs = (flat(_merged(estimate(trial.meta, task).grads)) for estimate in (gradient, _unrolled(trial)))
        error, size = float((ours - theirs).norm()), float(theirs.norm())
        if not error <= precision.tolerance * size:
            found.problems.append(
                f"the exact meta-gradient is off by {error:.1e} of {size:.1e} from that of the inner loop unrolled in "
                "one graph: the loss or the inner rule is not a function of what it is given"
            )
            return
    task = trial.tasks[0]

    def adapted(at: Params) -> Tensor:
        meta = _parted(at)
        return query_loss(trial.inner, meta, finish(trial.inner, meta, task.support).phi, task.query)

    grads = _merged(gradient(trial.meta, task).grads)
    verdict: Verdict = judge(adapted, slope(grads), _merged(trial.meta), precision)
    if verdict == "wrong":
        # Of many kinks close together, float32's wide differences cannot tell what is hidden: no reason to refuse.
        fine = next(iter(trial.meta.weights.values())).dtype == torch.float64
        hides = "the inner rule hides something from autograd (.detach(), torch.no_grad())"
        (found.problems if fine else found.notes).append(
            "the exact meta-gradient is not the slope of the adapted query loss (by central differences), though the "
            f"loss alone is right: {hides if fine else f'{hides}, or float32 is too coarse for its kinks'}"
        )


def _unrolled(trial: Trial) -> MetaGradient:
    return lambda meta, task: unrolled(trial.inner, meta, task)


def _merged(meta: Meta) -> Params:
    """Return weights and rule as one, told apart by the first letter of their names."""
    return {part + name: value for part, tensors in zip("wr", meta, strict=True) for name, value in tensors.items()}


def _parted(at: Params) -> Meta:
    return Meta(*({name[1:]: value for name, value in at.items() if name[0] == part} for part in "wr"))


def _ask(given: Trial, gradient: MetaGradient) -> Iterator[str]:
    """Give a sentence when the estimator's own answer is not finite, or not the same when asked again."""
    for task in given.tasks:
        first, again = gradient(given.meta, task), gradient(given.meta, task)
        endless = [name for name, grad in first.grads.weights.items() if not bool(torch.isfinite(grad).all())]
        if endless or not bool(torch.isfinite(first.loss)):
            where = f" for {', '.join(endless)}" if endless else ""
            yield f"the meta-gradient{where} is not finite where the loss is {float(first.loss):.3g}: take a smaller lr"
        pairs = zip(tree_leaves(first), tree_leaves(again), strict=True)
        if first.loss.device.type == "cpu" and not all(torch.equal(a, b) for a, b in pairs):
            yield "the meta-gradient is another when it is asked again: a round must be repeatable"


def _remarks(trial: Trial, inner: Inner, went: Run) -> Iterator[str]:
    """Give sentences on what is right and still good to know."""
    idle = [name for name, grad in _gradients(trial).items() if not bool(grad.any())]
    if idle:
        yield f"at these weights the loss of the tasks tried has no gradient for {', '.join(idle)}"
    if went.seen.places(ATTENTION.__contains__):
        yield "attention runs by torch's math kernel, the only one that can be differentiated twice"
    try:
        batch = trial.tasks[0].support
        pair = type(batch)(*(torch.stack([tensor, tensor]) for tensor in batch))
        torch.func.vmap(torch.func.grad(inner.loss), (None, 0), randomness="different")(trial.meta.weights, pair)
    except Exception as error:  # What cannot be batched says so in many ways.
        yield f"the model does not run for many tasks at once by vmap ({summed_up(error)}): the task loop is used"


def _gradients(trial: Trial) -> Params:
    """Return the sum of the absolute gradients of the loss on every set of every task, by weight."""
    total = {name: torch.zeros_like(weight) for name, weight in trial.meta.weights.items()}
    for task in trial.tasks:
        for batch in task:
            found = derivative(partial(trial.loss, batch=batch), trial.meta.weights)
            total = {name: value + found[name].abs() for name, value in total.items()}
    return total
