"""Operations with usable second derivatives: math attention, and cheaper batch normalisation and max-pooling."""

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel

from online_meta.functional.autodiff import is_transformed


class _MathKernel:
    """A context manager that selects torch's math attention kernel, shared by all threads of the process.

    Torch's kernel selection is global: the first thread to enter sets it and the last one to leave restores it. With
    one context manager per thread, a thread could restore the selection while another one still needs the math kernel,
    or the math kernel could stay selected forever.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._chosen = ExitStack()

    @contextmanager
    def __call__(self) -> Iterator[None]:
        with self._lock:
            if self._inside == 0:
                self._chosen.enter_context(sdpa_kernel(SDPBackend.MATH))
            self._inside += 1
        try:
            yield
        finally:
            with self._lock:
                self._inside -= 1
                if self._inside == 0:
                    self._chosen.close()


math_attention = _MathKernel()
"""A context in which ``scaled_dot_product_attention`` uses torch's math kernel; threads may share it."""


BATCH_NORM_LAYERS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def use_fast_double_backward(module: nn.Module) -> None:
    """Make the batch normalisation layers of ``module`` use ``batch_norm`` where it is faster; edits it in place.

    Only torch's own layer types with weights and without running statistics are changed. They use it on a CPU, outside
    of transforms. Torch's own second derivative took a third of the time of Conv4's exact meta-gradient.
    """
    for layer in module.modules():
        if type(layer) in BATCH_NORM_LAYERS and layer.affine and not layer.track_running_stats:
            layer.forward = partial(_forward, layer, layer.forward)


def _forward(layer: Any, plain: Any, x: Tensor) -> Tensor:
    # Inputs that are too small or of a wrong shape go to torch, which raises its own errors; batch_norm checks nothing.
    fits = x.dim() > 1 and x.shape[1] == layer.num_features and x.numel() > x.shape[1]
    if not (fits and torch.is_grad_enabled() and x.device.type == "cpu") or is_transformed():
        output: Tensor = plain(x)
        return output
    layer._check_input_dim(x)
    return batch_norm(x, layer.weight, layer.bias, layer.eps)


def batch_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Return weight * h + bias, h = (x - mean) / sqrt(variance + eps) (Ioffe & Szegedy, ICML 2015).

    ``x`` has shape (n, channels, ...), ``weight`` and ``bias`` (channels,); mean and variance are taken over each
    channel of the batch. The result can be differentiated twice; a third derivative raises ``RuntimeError``.
    """
    output: Tensor = _Normalise.apply(x, weight, bias, eps)  # type: ignore[no-untyped-call]
    return output


class _Normalise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        output, mean, scale = torch.native_batch_norm(x, weight, bias, None, None, True, 0.0, eps)
        ctx.save_for_backward(x, weight, mean, scale)
        ctx.eps = eps
        return output

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        return *_Pull.apply(cotangents[0], *ctx.saved_tensors, ctx.eps), None  # type: ignore[no-untyped-call]


class _Pull(torch.autograd.Function):
    """The first derivative, g -> (d x, d weight, d bias): d x = weight s (g - mean(g) - h mean(g h)), s the scale."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor, weight: Tensor, mean: Tensor, scale: Tensor, eps: float) -> Any:
        pulled = _pull(g, x, weight, mean, scale, eps)
        ctx.save_for_backward(g, x, weight, mean, scale, *pulled[1:])
        ctx.eps = eps
        return pulled

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, v: Tensor, a: Tensor, b: Tensor) -> Any:
        """Pull (v, a, b), the cotangents of (d x, d weight, d bias), back to g, x and the weight.

        With k = mean(v g) - mean(v) mean(g) - mean(v h) mean(g h), this is the gradient of the sum over channels of
        n (weight s k + a mean(g h) + b mean(g)). In each channel, the cotangents of g and x are linear combinations of
        v, g, x and 1.
        """
        g, x, weight, mean, scale, g_h, g_sum = ctx.saved_tensors
        count = x.numel() // x.shape[1]
        to_g, v_h, v_sum = _pull(v, x, weight, mean, scale, ctx.eps)
        v_h, v_mean, g_h, g_mean = v_h / count, v_sum / count, g_h / count, g_sum / count
        k = _dot(v, g) / count - v_mean * g_mean - v_h * g_h

        _add(to_g, a * scale, x, b - a * scale * mean)
        of_g = scale * (a - weight * scale * v_h)
        of_v = -weight * scale.square() * g_h
        of_h = scale * (2 * weight * scale * v_h - a) * g_h - weight * scale.square() * k
        rest = -(of_v * v_mean + of_g * g_mean)
        to_x = g * _broadcast(of_g, g)
        _add(to_x, of_v, v, rest - of_h * scale * mean)
        to_x.addcmul_(x, _broadcast(of_h * scale, x))
        return to_g, to_x, scale * count * k, None, None, None


def _pull(g: Tensor, x: Tensor, weight: Tensor, mean: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, ...]:
    """Return d x, d weight = sum(g h) and d bias = sum(g)."""
    backward = torch.ops.aten.native_batch_norm_backward
    pulled: tuple[Tensor, ...] = backward(g, x, weight, None, None, mean, scale, True, eps, [True, True, True])
    return pulled


def _add(total: Tensor, factor: Tensor, x: Tensor, offset: Tensor) -> None:
    """Add factor * x + offset to ``total`` in place, with one factor and offset per channel."""
    total.addcmul_(x, _broadcast(factor, x)).add_(_broadcast(offset, x))


def _dot(left: Tensor, right: Tensor) -> Tensor:
    """Return the sum of left * right over all dimensions except the channels."""
    return torch.linalg.vecdot(left.flatten(2), right.flatten(2)).sum(0) if left.dim() > 2 else (left * right).sum(0)


def _broadcast(channels: Tensor, like: Tensor) -> Tensor:
    return channels.view(-1, *[1] * (like.dim() - 2))


def use_lean_pooling(module: nn.Module) -> None:
    """Make max-pooling layers of ``module`` store less, and pool before a ReLU that comes first; edits it in place.

    max(relu(x)) = relu(max(x)), and the derivatives are equal, too: where the maximum is not positive, both are 0. So
    in an ``nn.Sequential`` the ReLU is computed for a quarter of the entries, and the graph of a block of Conv4 holds
    one large tensor, the input of the normalisation. Only torch's own layer types are changed. Inside of transforms
    everything stays as it is, so that recorded programs stay the same.
    """
    for layer in module.modules():
        if type(layer) is nn.MaxPool2d and not layer.return_indices:
            vars(layer)["forward"] = partial(_max_pool, layer, layer.forward)
    for layer in module.modules():
        if type(layer) is nn.Sequential and any(map(_can_swap, layer, [*layer][1:])):
            vars(layer)["forward"] = partial(_forward_in_order, layer, _swap([*layer]))


def _can_swap(first: nn.Module, second: nn.Module) -> bool:
    return (type(first), type(second)) == (nn.ReLU, nn.MaxPool2d) and not second.return_indices


def _swap(layers: list[nn.Module]) -> list[nn.Module]:
    order: list[nn.Module] = []
    while layers:
        layer = layers.pop(0)
        order += [layers.pop(0), layer] if layers and _can_swap(layer, layers[0]) else [layer]
    return order


def _forward_in_order(layers: nn.Sequential, order: list[nn.Module], x: Any) -> Any:
    for layer in layers if is_transformed() else order:
        x = layer(x)
    return x


def _max_pool(layer: Any, plain: Any, x: Tensor) -> Tensor:
    """Return max-pooling whose graph holds the places of the maxima alone, where its windows do not overlap."""
    pairs = zip(_as_pair(layer.kernel_size), _as_pair(layer.stride), strict=True)
    apart = all(stride >= size for size, stride in pairs) and _as_pair(layer.dilation) == (1, 1)
    fits = x.device.type == "cpu" and x.dim() == 4 and x.is_contiguous() and torch.is_grad_enabled()
    if is_transformed() or not (apart and fits):
        pooled: Tensor = plain(x)
        return pooled
    pooled = _Pool.apply(x, layer)  # type: ignore[no-untyped-call]
    return pooled  # noqa: RET504


def _as_pair(size: int | tuple[int, ...]) -> tuple[int, ...]:
    return (size, size) if isinstance(size, int) else size


class _Pool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Any) -> Tensor:
        pooled, places = nn.functional.max_pool2d(
            x, layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.ceil_mode, return_indices=True
        )
        ctx.save_for_backward(places)
        ctx.shape = x.shape
        return pooled

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        """Put each cotangent at the place of its maximum; this can be differentiated again."""
        (places,), (g,) = ctx.saved_tensors, cotangents
        maps = g.new_zeros(*ctx.shape[:2], ctx.shape[2] * ctx.shape[3])
        return maps.scatter_(2, places.flatten(2), g.flatten(2)).view(ctx.shape), None
