"""Max-pooling before the ReLU is the same network with the same derivatives, and needs less memory."""

import copy

import pytest
import torch
from torch import nn

import online_meta as om
from online_meta.functional.double_backward import use_lean_pooling
from online_meta.testing.oracle import CRITERIA
from tests.benchmarks.networks import conv4
from tests.benchmarks.works import image_task
from tests.numerics.meter import MemoryMeter

POOLS = {
    "halves": nn.MaxPool2d(2),
    "rounds up": nn.MaxPool2d(2, ceil_mode=True),
    "leaves gaps": nn.MaxPool2d((1, 2), stride=(2, 3)),
    "pads": nn.MaxPool2d(3, padding=1),
    "overlaps": nn.MaxPool2d(3, stride=2),
    "dilates": nn.MaxPool2d(2, dilation=2),
}


def both_derivatives(module, x):
    """Return output and derivatives of two orders by input and weights; half of the windows have no positive entry."""
    given = [x.clone().requires_grad_(), *module.parameters()]
    output = module(given[0])
    first = torch.autograd.grad((output**3).sum(), given, create_graph=True)
    penalty = sum((share**2 * k).sum() for k, share in enumerate(first, 1))
    return [output, *first, *torch.autograd.grad(penalty, given)]


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("pool", POOLS.values(), ids=POOLS)
def test_pooling_first_changes_no_value(pool, inplace):
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(inplace), pool, nn.Conv2d(3, 2, 1), nn.Softplus())
    plain.double()
    lean = copy.deepcopy(plain)
    use_lean_pooling(lean)
    x = torch.randn(4, 2, 7, 9, dtype=torch.float64)
    x[:2] = x[:2].clamp(max=0.0)  # Ties, and maxima that are not positive.
    for found, right in zip(both_derivatives(lean, x), both_derivatives(plain, x), strict=True):
        assert torch.equal(found, right)


def test_the_relu_comes_last_and_hooks_see_it():
    lean = nn.Sequential(nn.ReLU(), nn.MaxPool2d(2), nn.ReLU(), nn.Flatten())
    use_lean_pooling(lean)
    seen = []
    for layer in lean:
        layer.register_forward_hook(lambda layer, given, output: seen.append((type(layer).__name__, output.shape[-1])))
    lean(torch.randn(1, 2, 4, 4, requires_grad=True))
    assert seen == [("MaxPool2d", 2), ("ReLU", 2), ("ReLU", 2), ("Flatten", 8)]


def test_the_graph_of_conv4_holds_less_than_that_of_the_plain_module():
    torch.manual_seed(0)
    module, task = conv4(5, 8, 32), image_task(5, 1, 15, 0, 32)
    inner = om.Inner(om.model_loss(module, "cross_entropy"), om.rules.sgd(lr=0.01), 2)
    meta = inner.init(dict(module.named_parameters()))

    def peak(call):
        with MemoryMeter() as meter:
            call()
        return meter.peak

    plain = peak(lambda: CRITERIA["cross_entropy"](module(task.query.x), task.query.y).backward())
    assert peak(lambda: om.exact(inner)(meta, task)) <= 0.85 * plain
