"""A model tried on a few small tasks: run it, watch it, and see whether it is a function of what it is given."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from online_meta.explain import explain_randomness
from online_meta.inner import Inner, query_loss
from online_meta.tree import to_float64
from online_meta.types import Batch, Meta, Params, Task
from online_meta.watch import LayerTrace, trace_layers

MAX_SAMPLES = 8
MAX_TASKS = 2
MAX_STEPS = 2


@dataclass(frozen=True)
class Probe:
    """The inner loop, meta-parameters and tasks that are tried, as few and small as will do."""

    inner: Inner
    meta: Meta
    tasks: tuple[Task, ...]

    def loss(self, weights: Params, batch: Batch | None = None) -> Tensor:
        """Return the loss of ``weights`` on a batch, the first support set if left out, with a query loss's draws."""
        return query_loss(self.inner, Meta(weights, self.meta.rule), {}, batch or self.tasks[0].support)


@dataclass
class ProbeResult:
    """How a trial went: what was ``trace``, the ``error`` that ended it, and what is ``modified`` that was given."""

    trace: LayerTrace
    error: Exception | None = None
    modified: list[str] = field(default_factory=list)


def make_probe(inner: Inner, meta: Meta, tasks: Sequence[Task]) -> Probe:
    """Return a trial on the first samples of the first tasks, with copies of what may be written to."""

    def first(task: Task) -> Task:
        return Task(*(Batch(*(tensor[:MAX_SAMPLES].detach().clone() for tensor in batch)) for batch in task))

    small = tuple(first(task) for task in tasks[:MAX_TASKS])
    copied: Meta = tree_map(lambda leaf: leaf.detach().clone(), meta)
    return Probe(replace(inner, steps=min(inner.steps, MAX_STEPS)), copied, small)


def in_float64(probe: Probe) -> Probe:
    """Return the trial with all that is floating in float64."""
    meta, tasks = to_float64((probe.meta, probe.tasks))
    return replace(probe, meta=meta, tasks=tasks)


def run_probe(probe: Probe, second: bool) -> ProbeResult:
    """Differentiate the support loss once, and once more if ``second``; nothing is raised."""
    leaves = {name: weight.clone().requires_grad_() for name, weight in probe.meta.weights.items()}
    original = probe.tasks[0].support
    support = Batch(*(tensor.clone() for tensor in original))
    probe = replace(probe, tasks=(probe.tasks[0]._replace(support=support),))
    with trace_layers() as trace, torch.enable_grad():
        result = ProbeResult(trace)
        try:
            loss = probe.loss(leaves)
            trace.dtypes.add(loss.dtype)
            trace.in_backward = True
            _differentiate(loss, leaves, second)
        except Exception as error:  # Whatever a user's model raises is what is asked for.
            result.error = error
    pairs = {f"the weight {name!r}": (leaf, probe.meta.weights[name]) for name, leaf in leaves.items()}
    pairs |= {"its input x": (support.x, original.x), "the targets y": (support.y, original.y)}
    result.modified += [name for name, (now, before) in pairs.items() if not torch.equal(now, before)]
    result.modified += [f"the buffer {name!r}" for name in trace.modified]
    return result


def _differentiate(loss: Tensor, leaves: Params, second: bool) -> None:
    if not loss.requires_grad:
        return
    tensors = [*leaves.values()]
    grads = torch.autograd.grad(loss, tensors, create_graph=second, allow_unused=True, materialize_grads=True)
    if second:
        dot = torch.stack([(grad * grad).sum() for grad in grads]).sum()
        if dot.requires_grad:
            torch.autograd.grad(dot, tensors, allow_unused=True)


def find_impurities(probe: Probe, result: ProbeResult) -> Iterator[str]:
    """Give a sentence when the model writes to what it is given, or answers otherwise when it is asked again."""
    for name in dict.fromkeys(result.modified):
        yield (
            f"forward edits {name}, and a pure function must not: make a new tensor (y = y + x, not y += x), and keep "
            "nothing between calls"
        )
    if result.modified or result.error is not None:
        return
    if not _is_repeatable(lambda: probe.loss(probe.meta.weights)):
        yield explain_randomness(result.trace, _is_repeatable(lambda: _seeded_loss(probe)))


def _seeded_loss(probe: Probe) -> Tensor:
    torch.manual_seed(0)
    return probe.loss(probe.meta.weights)


def _is_repeatable(loss: Callable[[], Tensor]) -> bool:
    """Return whether a few calls agree; to rounding, for sums on an accelerator come in any order."""
    first, *others = (loss() for _ in range(3))
    tolerance = 1e3 * torch.finfo(first.dtype).eps
    return all(torch.allclose(first, other, rtol=tolerance, atol=0, equal_nan=True) for other in others)
