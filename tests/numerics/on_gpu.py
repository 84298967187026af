"""Checks of meta-gradients that need a GPU: ``python -m tests.numerics.on_gpu``. The test suite does not run them."""

import sys
from collections.abc import Callable

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

import online_meta as om
from online_meta.preflight.preflight import unrolled
from online_meta.types import MetaGrad, Task
from trainers.models import transformer


def task(*shape: int) -> Task:
    """Return a random task on the GPU with inputs of the given shape and two regression targets."""
    random = torch.Generator().manual_seed(0)
    made = [torch.randn(8, *wide, generator=random, dtype=torch.float64) for wide in (shape, (2,), shape, (2,))]
    return tree_map(torch.Tensor.cuda, Task(om.Batch(*made[:2]), om.Batch(*made[2:])))


def peak_of(work: Callable[[], MetaGrad]) -> tuple[MetaGrad, int]:
    work()
    torch.cuda.reset_peak_memory_stats()
    return work(), torch.cuda.max_memory_allocated()


def check_offload(rematerialise: bool) -> bool:
    """Check that offloading gives the same bits and uses less memory on the GPU."""
    module = nn.Sequential(nn.Linear(4, 2048), nn.Tanh(), nn.Linear(2048, 2)).double().cuda()
    inner = om.Inner(om.model_loss(module, "mse"), om.rules.sgd(lr=0.01), 16)
    meta, one = inner.init(dict(module.named_parameters())), task(4)
    (right, whole), (found, less) = (
        peak_of(lambda away=away: om.exact(inner, offload=away, rematerialise=rematerialise)(meta, one))
        for away in (False, True)
    )
    print(f"# offload, rematerialise = {rematerialise}: {less / 1e6:.1f} MB of {whole / 1e6:.1f}", flush=True)
    same = all(torch.equal(a, b) for a, b in zip(tree_leaves(found), tree_leaves(right), strict=True))
    return same and less < whole


def check_recompute(dropout: float) -> bool:
    """Check that recomputation agrees with the unrolled graph, also with dropout, and uses less memory."""
    module = transformer(2, 32, features=3, width=32, heads=4, layers=4, dropout=dropout).double().cuda()
    found, peaks = [], []
    for globs in ((), ("body.*",)):
        inner = om.Inner(om.model_loss(module, "mse", recompute=globs), om.rules.sgd(lr=0.1), 3)
        meta, one = inner.init(dict(module.named_parameters())), task(32, 3)
        got, peak = peak_of(lambda inner=inner, meta=meta, one=one: om.exact(inner)(meta, one))
        found.append(got)
        peaks.append(peak)
    right = unrolled(om.Inner(om.model_loss(module, "mse"), om.rules.sgd(lr=0.1), 3), meta, one)
    worst = max(
        float((a - b).abs().max() / b.abs().max().clamp(min=1e-30))
        for got in found
        for a, b in zip(tree_leaves(got), tree_leaves(right), strict=True)
    )
    kept, less = (peak / 1e6 for peak in peaks)
    print(f"# recompute, dropout {dropout}: error {worst:.1e}, {less:.1f} MB of {kept:.1f}", flush=True)
    return worst < 1e-9 and less < kept


if __name__ == "__main__":
    held = [check_offload(False), check_offload(True), check_recompute(0.0), check_recompute(0.2)]
    print(f"{sum(held)} of {len(held)} hold", flush=True)
    sys.exit(not all(held))
