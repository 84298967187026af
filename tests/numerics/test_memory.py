import pytest
import torch
from torch import nn

import online_meta as om
from online_meta.inner import fast_weights
from online_meta.testing.oracle import unrolled_maml
from tests.numerics.meter import MemoryMeter, bytes_of

FEW, MANY = 4, 24
WIDTH, SAMPLES = 32, 400


def setting(steps, fast=("*",)):
    """Return a network whose activations take far more memory than its weights."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 1))
    inner = om.Inner(om.model_loss(module, "mse"), om.rules.sgd(lr=0.01), steps, fast)
    batch = om.Batch(torch.randn(SAMPLES, WIDTH), torch.randn(SAMPLES, 1))
    return module, inner, inner.init(dict(module.named_parameters())), om.Task(batch, batch)


def peak_of(work):
    work()
    with MemoryMeter() as meter:
        work()
    return meter.peak


def peak_of_exact(steps, fast=("*",)):
    _, inner, meta, task = setting(steps, fast)
    return peak_of(lambda: om.exact(inner)(meta, task))


def peak_of_unrolled(steps):
    module, _, meta, task = setting(steps)
    return peak_of(lambda: unrolled_maml(module, "mse", meta.weights, task, lr=0.01, steps=steps))


@pytest.mark.parametrize("fast", [("*",), ("4.*",)], ids=["all", "head"])
def test_one_more_step_stores_the_adapted_weights_and_no_graph(fast):
    _, inner, meta, _ = setting(FEW, fast)
    a_step = (peak_of_exact(MANY, fast) - peak_of_exact(FEW, fast)) / (MANY - FEW)
    assert a_step <= 1.1 * bytes_of(fast_weights(inner, meta.weights)) + 64


def test_the_meter_counts_the_graph_of_an_unrolled_loop():
    _, _, meta, _ = setting(FEW)
    a_step = (peak_of_unrolled(MANY) - peak_of_unrolled(FEW)) / (MANY - FEW)
    assert a_step > 5 * bytes_of(meta.weights)


def test_the_meter_counts_live_tensors_only():
    with MemoryMeter() as meter:
        kept = torch.zeros(1000)
        for _ in range(10):
            torch.zeros(500)
        view = kept[:10]
    assert meter.peak == 4 * 1500
    assert view.untyped_storage().nbytes() == 4000
