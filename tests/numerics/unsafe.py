"""Models, (n, 4) -> (n, 2), that cannot be meta-learned as they are: one for each known mistake."""

import random as pythons
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


class Between(nn.Module):
    """Two layers with a function ``between`` them."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.body, self.head, self.between = nn.Linear(4, 6), nn.Linear(6, 2), between

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.between(torch.tanh(self.body(x))))


class Middle(nn.Module):
    """A layer without weights."""

    def __init__(self, does: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.does = does

    def forward(self, x: Tensor) -> Tensor:
        return self.does(x)


def between(layer: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), layer, nn.Linear(6, 2))


def plain() -> nn.Module:
    return between(nn.Tanh())


class WrongSlope(torch.autograd.Function):
    """x^3 with the wrong derivative 2 x^2."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * 2 * x**2


class WrongCurvature(WrongSlope):
    """x^3 whose derivative 3 x^2 is treated as a constant."""

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * 3 * x.detach() ** 2


class Once(WrongSlope):
    """x^3, differentiable once; ``torch.autograd.grad`` raises no error and uses 0 for the second derivative."""

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * 3 * x**2


def scaled_without_graph(x: Tensor) -> Tensor:
    with torch.no_grad():
        scale = 1 / x.norm()
    return x * scale


def through_numpy(x: Tensor) -> Tensor:
    return x * torch.from_numpy(x.detach().numpy()).mean()


def doubled_in_place(x: Tensor) -> Tensor:
    y = torch.exp(x)
    y *= 2
    return y


class Counting(nn.Module):
    """A layer that counts its calls in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x


class Remembering(nn.Module):
    """A layer whose output depends on its number of calls."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * self.calls


class EditsInput(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        x -= x.mean()
        return super().forward(x)


class EditsWeight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.body.weight.clamp_(-0.1, 0.1)
        return self.body(x)


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.body, self.head, self.reentrant = nn.Linear(4, 6), nn.Linear(6, 2), reentrant

    def forward(self, x: Tensor) -> Tensor:
        return self.head(checkpoint(self._body, x, use_reentrant=self.reentrant))

    def _body(self, x: Tensor) -> Tensor:
        return torch.tanh(self.body(x))


class IgnoresWeights(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return x[:, :2] + 0 * super().forward(x)


class Norm(nn.Module):
    """Weight normalisation in plain operations, as a parametrisation: w = g * v / ||v|| for each row."""

    def forward(self, g: Tensor, v: Tensor) -> Tensor:
        return g * v / v.norm(dim=1, keepdim=True)

    def right_inverse(self, w: Tensor) -> tuple[Tensor, Tensor]:
        return w.norm(dim=1, keepdim=True), w


def weight_normed(how: str) -> nn.Module:
    """Return a model with weight normalisation by torch over "rows" or the "whole", or by "plain" operations."""
    layer = nn.Linear(6, 6)
    if how == "plain":
        nn.utils.parametrize.register_parametrization(layer, "weight", Norm())
    else:
        nn.utils.parametrizations.weight_norm(layer, dim=0 if how == "rows" else None)
    return between(layer)


NO_SLOPE = "is not its slope"
UNSAFE: dict[str, tuple[Callable[[], nn.Module], tuple[str, ...]]] = {
    # name: (the model, parts of the expected message: the place, and the advice)
    "running statistics": (
        lambda: between(nn.BatchNorm1d(6)),
        ("layer '2' (BatchNorm1d) keeps running statistics", "build it with track_running_stats=False"),
    ),
    "weight_norm": (lambda: weight_normed("rows"), ("layer '2' (ParametrizedLinear)", "dim=None")),
    "item": (
        lambda: between(Middle(lambda x: x * x.norm().item())),
        ("layer '2' (Middle)", NO_SLOPE, "forward uses .item()"),
    ),
    "float": (lambda: between(Middle(lambda x: x * float(x.norm()))), ("layer '2' (Middle)", "float()")),
    "detach": (lambda: between(Middle(lambda x: x * x.detach())), ("layer '2' (Middle)", "forward uses .detach()")),
    "data": (lambda: between(Middle(lambda x: x * x.data)), ("layer '2' (Middle)", "forward uses .data")),
    "detach outside of layers": (
        lambda: Between(lambda x: x * x.detach()),
        ("model itself (Between)", "forward uses .detach()"),
    ),
    "all detached": (lambda: Between(lambda x: x.detach()), ("model itself (Between)", "forward uses .detach()")),
    "no_grad": (lambda: between(Middle(scaled_without_graph)), ("layer '2' (Middle)", "torch.no_grad()")),
    "numpy": (lambda: between(Middle(through_numpy)), ("layer '2' (Middle)", ".numpy()")),
    "wrong backward": (
        lambda: between(Middle(WrongSlope.apply)),
        ("the gradient of the layer '2' (Middle)", NO_SLOPE, "torch.autograd.Function", "gradgradcheck"),
    ),
    "wrong double backward": (
        lambda: between(Middle(WrongCurvature.apply)),
        ("the second derivative of the layer '2' (Middle)", NO_SLOPE),
    ),
    "once differentiable": (
        lambda: between(Middle(Once.apply)),
        ("the second derivative of the layer '2' (Middle)", "(once_differentiable)"),
    ),
    "in place": (
        lambda: between(Middle(doubled_in_place)),
        ("edited in place", "layer '2' (Middle) does so by mul_", "y = y + x"),
    ),
    "edits its input": (lambda: EditsInput(nn.Linear(4, 2)), ("forward edits its input x", "y = y + x")),
    "edits a weight": (EditsWeight, ("forward edits the weight 'body.weight'",)),
    "edits a buffer": (lambda: between(Counting()), ("forward edits the buffer '2.calls'",)),
    "random": (
        lambda: between(Middle(lambda x: F.dropout(x, 0.5))),
        ("repeated calls give different losses", "layer '2' (Middle) draws by dropout", "nn.Dropout layers"),
    ),
    "Python's random": (
        lambda: between(Middle(lambda x: x * pythons.random())),
        ("even from the same torch seed", "numpy's, Python's"),
    ),
    "remembers": (lambda: between(Remembering()), ("keeps state between calls",)),
    "checkpoint": (lambda: Checkpointed(False), ("layer 'body' (Linear)", "torch.utils.checkpoint", "rematerialise")),
    "reentrant checkpoint": (lambda: Checkpointed(True), ("torch.utils.checkpoint", "rematerialise")),
    "deaf": (lambda: IgnoresWeights(4, 2), ("depends on none of the weights",)),
}
