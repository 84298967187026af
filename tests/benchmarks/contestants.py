"""The contestants in torch; each is prepared for a workload once, and then called repeatedly."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

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
"""(work, weights, tasks, folder for compiled programs) -> a function that computes the mean meta-gradient."""


def stack_tasks(tasks: list[Task]) -> Task:
    """Stack the tasks along a new first dimension."""
    found: Task = tree_map(lambda *leaves: torch.stack(leaves), *tasks)
    return found


CHUNK = 25


def prepare_ours(how: str, **options: Any) -> Prepare:
    """Return the contestant for a batching mode of this package; all but the loop get stacked tasks, like JAX.

    ``options`` are those of ``exact``.
    """

    def prepare(work: Work, weights: Params, tasks: list[Task], programs: Path) -> Callable[[], MetaGrad]:
        inner = om.Inner(om.model_loss(work.module(), work.loss), om.rules.sgd(lr=work.lr), work.steps)
        mean = om.over_tasks(om.exact(inner, **options), how, folder=programs)
        meta, given = inner.init(weights), tasks if how == "loop" else stack_tasks(tasks)
        return lambda: mean(meta, given)

    return prepare


def prepare_unrolled(work: Work, weights: Params, tasks: list[Task], programs: Path) -> Callable[[], MetaGrad]:
    """Process one task at a time with one graph through all inner steps, like learn2learn and others."""
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


def prepare_higher(work: Work, weights: Params, tasks: list[Task], programs: Path) -> Callable[[], MetaGrad]:
    """Use the library higher: a patched module and a differentiable optimizer."""
    import higher

    module, criterion = _load_module(work, weights), CRITERIA[work.loss]
    optimizer = torch.optim.SGD(module.parameters(), lr=work.lr)

    def query_loss(task: Task) -> Tensor:
        with higher.innerloop_ctx(module, optimizer, copy_initial_weights=False) as (fast, steps):
            for _ in range(work.steps):
                steps.step(criterion(fast(task.support.x), task.support.y))
            return criterion(fast(task.query.x), task.query.y)

    return lambda: _accumulate(dict(module.named_parameters()), tasks, query_loss)


def prepare_torchopt(work: Work, weights: Params, tasks: list[Task], programs: Path) -> Callable[[], MetaGrad]:
    """Use the library TorchOpt: an optimizer that writes differentiable parameters into the module."""
    import torchopt

    module, criterion = _load_module(work, weights), CRITERIA[work.loss]
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
    """Return the mean loss and gradient; the graph of each task is freed before the next one is built."""
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


def _load_module(work: Work, weights: Params) -> nn.Module:
    module = work.module()
    module.load_state_dict(weights)
    return module


CONTESTANTS: dict[str, Prepare] = {
    **{f"ours, {how}": prepare_ours(how) for how in ("loop", "vmap", "traced", "compiled")},
    "ours, rematerialised": prepare_ours("loop", rematerialise=True),
    f"ours, {CHUNK} queries at a time": prepare_ours("loop", query_chunk=CHUNK),
    "unrolled": prepare_unrolled,
    "higher": prepare_higher,
    "torchopt": prepare_torchopt,
}
PACKAGES = {"unrolled": "torch", "higher": "higher", "torchopt": "torchopt", "JAX": "jax"}
"""The package that a contestant imports; the others import ``online_meta``."""
