"""A model tried on a few small tasks: run it, watch it, and see whether it is a function of what it is given."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from online_meta.explain import explain_chance
from online_meta.inner import Inner, query_loss
from online_meta.tree import doubled
from online_meta.types import Batch, Meta, Params, Task
from online_meta.watch import Watch, watching

SAMPLES = 8
TASKS = 2
STEPS = 2


@dataclass(frozen=True)
class Trial:
    """The inner loop, meta-parameters and tasks that are tried, as few and small as will do."""

    inner: Inner
    meta: Meta
    tasks: tuple[Task, ...]

    def loss(self, weights: Params, batch: Batch | None = None) -> Tensor:
        """Return the loss of ``weights`` on a batch, the first support set if left out, with a query loss's draws."""
        return query_loss(self.inner, Meta(weights, self.meta.rule), {}, batch or self.tasks[0].support)


@dataclass
class Run:
    """How a trial went: what was ``seen``, the ``error`` that ended it, and what is ``edited`` that was given."""

    seen: Watch
    error: Exception | None = None
    edited: list[str] = field(default_factory=list)


def begin_trial(inner: Inner, meta: Meta, tasks: Sequence[Task]) -> Trial:
    """Return a trial on the first samples of the first tasks, with copies of what may be written to."""

    def first(task: Task) -> Task:
        return Task(*(Batch(*(tensor[:SAMPLES].detach().clone() for tensor in batch)) for batch in task))

    small = tuple(first(task) for task in tasks[:TASKS])
    copied: Meta = tree_map(lambda leaf: leaf.detach().clone(), meta)
    return Trial(replace(inner, steps=min(inner.steps, STEPS)), copied, small)


def in_float64(trial: Trial) -> Trial:
    """Return the trial with all that is floating in float64."""
    meta, tasks = doubled((trial.meta, trial.tasks))
    return replace(trial, meta=meta, tasks=tasks)


def run(trial: Trial, second: bool) -> Run:
    """Differentiate the support loss once, and once more if ``second``; nothing is raised."""
    leaves = {name: weight.clone().requires_grad_() for name, weight in trial.meta.weights.items()}
    held = trial.tasks[0].support
    support = Batch(*(tensor.clone() for tensor in held))
    trial = replace(trial, tasks=(trial.tasks[0]._replace(support=support),))
    with watching() as seen, torch.enable_grad():
        went = Run(seen)
        try:
            loss = trial.loss(leaves)
            seen.dtypes.add(loss.dtype)
            seen.going_back = True
            _differentiate(loss, leaves, second)
        except Exception as error:  # Whatever a user's model raises is what is asked for.
            went.error = error
    pairs = {f"the weight {name!r}": (leaf, trial.meta.weights[name]) for name, leaf in leaves.items()}
    pairs |= {"its input x": (support.x, held.x), "the targets y": (support.y, held.y)}
    went.edited += [name for name, (now, before) in pairs.items() if not torch.equal(now, before)]
    went.edited += [f"the buffer {name!r}" for name in seen.edited]
    return went


def _differentiate(loss: Tensor, leaves: Params, second: bool) -> None:
    if not loss.requires_grad:
        return
    tensors = [*leaves.values()]
    grads = torch.autograd.grad(loss, tensors, create_graph=second, allow_unused=True, materialize_grads=True)
    if second:
        dot = torch.stack([(grad * grad).sum() for grad in grads]).sum()
        if dot.requires_grad:
            torch.autograd.grad(dot, tensors, allow_unused=True)


def what_changes(trial: Trial, went: Run) -> Iterator[str]:
    """Give a sentence when the model writes to what it is given, or answers otherwise when it is asked again."""
    for name in dict.fromkeys(went.edited):
        yield (
            f"forward edits {name}, and a pure function must not: make a new tensor (y = y + x, not y += x), and keep "
            "nothing between calls"
        )
    if went.edited or went.error is not None:
        return
    if not _repeats(lambda: trial.loss(trial.meta.weights)):
        yield explain_chance(went.seen, _repeats(lambda: _seeded(trial)))


def _seeded(trial: Trial) -> Tensor:
    torch.manual_seed(0)
    return trial.loss(trial.meta.weights)


def _repeats(loss: Callable[[], Tensor]) -> bool:
    """Return whether a few calls agree; to rounding, for sums on an accelerator come in any order."""
    first, *others = (loss() for _ in range(3))
    tolerance = 1e3 * torch.finfo(first.dtype).eps
    return all(torch.allclose(first, other, rtol=tolerance, atol=0, equal_nan=True) for other in others)
