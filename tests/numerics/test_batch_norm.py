"""The second derivative of our batch normalisation agrees with torch's and with central differences."""

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

import online_meta as om
from online_meta.functional.double_backward import batch_norm, use_fast_double_backward

SHAPES = [(6, 3), (5, 3, 4), (4, 3, 5, 2), (2, 3, 2, 3, 2)]
EPS = 1e-2


def setting(shape, seed=0):
    random = torch.Generator().manual_seed(seed)

    def draw(*size):
        return torch.randn(*size, generator=random, dtype=torch.float64)

    return tuple(t.requires_grad_() for t in (2 * draw(*shape) + 1, draw(shape[1]), draw(shape[1])))


def torch_batch_norm(x, weight, bias, eps):
    return F.batch_norm(x, None, None, weight, bias, True, 0.0, eps)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_central_differences_agree_with_both_derivatives(shape):
    given = setting(shape)
    assert torch.autograd.gradcheck(lambda *given: batch_norm(*given, EPS), given)
    assert torch.autograd.gradgradcheck(lambda *given: batch_norm(*given, EPS), given)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_batch_norm_equals_torchs_up_to_rounding(shape):
    def second(function):
        given = setting(shape, seed=1)
        output = function(*given, EPS)
        first = torch.autograd.grad((output**3).sum(), given, create_graph=True)
        penalty = sum((share**2 * k).sum() for k, share in enumerate(first, 1))
        return [output, *first, *torch.autograd.grad(penalty, given)]

    for ours, right in zip(second(batch_norm), second(torch_batch_norm), strict=True):
        torch.testing.assert_close(ours, right, rtol=1e-11, atol=1e-11)


def test_a_third_derivative_is_refused():
    x, weight, bias = setting((6, 3))
    (first,) = torch.autograd.grad((batch_norm(x, weight, bias, EPS) ** 3).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad((first**2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        second.sum().backward()


class Doubled(nn.BatchNorm1d):
    """A user-defined layer that computes something else."""

    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    ("layer", "ours"),
    [
        (nn.BatchNorm1d(3, track_running_stats=False), True),
        (nn.BatchNorm1d(3), False),
        (nn.BatchNorm1d(3).eval(), False),
        (nn.BatchNorm1d(3, affine=False, track_running_stats=False), False),
        (Doubled(3, track_running_stats=False), False),
        (nn.GroupNorm(1, 3), False),
    ],
)
def test_only_supported_layers_are_replaced(layer, ours):
    x = setting((6, 3))[0].float()
    right = layer(x)
    use_fast_double_backward(layer)
    found = layer(x)
    assert (type(found.grad_fn).__name__ == "_NormaliseBackward") == ours
    torch.testing.assert_close(found, right)


@pytest.mark.parametrize("wrong", [(1, 3), (4, 5), (4, 3, 2, 2)])
def test_invalid_input_raises_torchs_own_error(wrong):
    layer = nn.BatchNorm1d(3, track_running_stats=False)
    with pytest.raises((ValueError, RuntimeError)) as right:
        layer(torch.ones(wrong))
    use_fast_double_backward(layer)
    with pytest.raises(right.type, match=str(right.value).split("(")[0][:20]):
        layer(torch.ones(wrong))


def test_the_users_module_is_not_modified():
    module = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3, track_running_stats=False))
    weights = dict(module.named_parameters())
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    ours = om.model_output(module)(weights, x)
    assert type(ours.grad_fn).__name__ == "_NormaliseBackward"
    assert type(functional_call(module, weights, (x,)).grad_fn).__name__ == "NativeBatchNormBackward0"
