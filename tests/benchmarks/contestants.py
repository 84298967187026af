"""The contestants that are torch: each is prepared for a work, then called again and again."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map

import online_meta as om
from online_meta.types import Meta, MetaGrad, Params, Task
from tests.benchmarks.networks import CRITERIA
from tests.benchmarks.works import Work

Prepare = Callable[[Work, Params, list[Task], Path], Callable[[], MetaGrad]]
"""(work, weights, tasks, a folder for compiled programs) -> what computes the mean meta-gradient over the tasks."""


def stacked(tasks: list[Task]) -> Task:
    """Return the tasks as one, along a new first dimension."""
    found: Task = tree_map(lambda *leaves: torch.stack(leaves), *tasks)
    return found


def ours(how: str, *, rematerialise: bool = False) -> Prepare:
    """The package, by one of its ways; all but the loop are given stacked tasks, as JAX is."""

    def prepare(work: Work, weights: Params, tasks: list[Task], programs: Path) -> Callable[[], MetaGrad]:
        inner = om.Inner(om.model_loss(work.module(), work.loss), om.rules.sgd(lr=work.lr), work.steps)
        mean = om.over_tasks(om.exact(inner, rematerialise=rematerialise), how, folder=programs)
        meta, given = inner.init(weights), tasks if how == "loop" else stacked(tasks)
        return lambda: mean(meta, given)

    return prepare


def unrolled(work: Work, weights: Params, tasks: list[Task], programs: Path) -> Callable[[], MetaGrad]:
    """Task by task, one graph through all inner steps, as learn2learn and others do it."""
    module, criterion = work.module(), CRITERIA[work.loss]
    leaves = {name: value.clone().requires_grad_() for name, value in weights.items()}

    def query_loss(task: Task) -> Tensor:
        phi: Params = leaves
        for _ in range(work.steps):
            loss = criterion(functional_call(module, phi, (task.support.x,)), task.support.y)
            grads = torch.autograd.grad(loss, [*phi.values()], create_graph=True)
            phi = {name: value - work.lr * grad for (name, value), grad in zip(phi.items(), grads, strict=True)}
        return criterion(functional_call(module, phi, (task.query.x,)), task.query.y)

    def call() -> MetaGrad:
        with sdpa_kernel(SDPBackend.MATH):
            return _accumulate(leaves, tasks, query_loss)

    return call


def with_higher(work: Work, weights: Params, tasks: list[Task], programs: Path) -> Callable[[], MetaGrad]:
    """The library higher: a patched module and a differentiable optimizer."""
    import higher

    module, criterion = _loaded(work, weights), CRITERIA[work.loss]
    optimizer = torch.optim.SGD(module.parameters(), lr=work.lr)

    def query_loss(task: Task) -> Tensor:
        with higher.innerloop_ctx(module, optimizer, copy_initial_weights=False) as (fast, steps):
            for _ in range(work.steps):
                steps.step(criterion(fast(task.support.x), task.support.y))
            return criterion(fast(task.query.x), task.query.y)

    return lambda: _accumulate(dict(module.named_parameters()), tasks, query_loss)


def with_torchopt(work: Work, weights: Params, tasks: list[Task], programs: Path) -> Callable[[], MetaGrad]:
    """The library TorchOpt: an optimizer that writes differentiable parameters into the module."""
    import torchopt

    module, criterion = _loaded(work, weights), CRITERIA[work.loss]
    leaves = dict(module.named_parameters())
    optimizer = torchopt.MetaSGD(module, lr=work.lr)
    start = torchopt.extract_state_dict(module, by="reference", detach_buffers=True)
    fresh = torchopt.extract_state_dict(optimizer, by="reference")

    def query_loss(task: Task) -> Tensor:
        torchopt.recover_state_dict(module, start)
        torchopt.recover_state_dict(optimizer, fresh)
        for _ in range(work.steps):
            optimizer.step(criterion(module(task.support.x), task.support.y))
        return criterion(module(task.query.x), task.query.y)

    return lambda: _accumulate(leaves, tasks, query_loss)


def _accumulate(leaves: Params, tasks: list[Task], query_loss: Callable[[Task], Tensor]) -> MetaGrad:
    """Return the mean loss and gradient; each task's graph is gone before the next one's is made."""
    total = torch.zeros(())
    for task in tasks:
        loss = query_loss(task)
        loss.backward()
        total += loss.detach()
        del loss
    grads = {name: leaf.grad.div_(len(tasks)) for name, leaf in leaves.items()}
    for leaf in leaves.values():
        leaf.grad = None
    return MetaGrad(total / len(tasks), Meta(grads, {}))


def _loaded(work: Work, weights: Params) -> nn.Module:
    module = work.module()
    module.load_state_dict(weights)
    return module


CONTESTANTS: dict[str, Prepare] = {
    **{f"ours, {how}": ours(how) for how in ("loop", "vmap", "traced", "compiled")},
    "ours, rematerialised": ours("loop", rematerialise=True),
    "unrolled": unrolled,
    "higher": with_higher,
    "torchopt": with_torchopt,
}
PACKAGES = {"unrolled": "torch", "higher": "higher", "torchopt": "torchopt", "JAX": "jax"}
"""What a contestant imports; all others import ``online_meta``."""
