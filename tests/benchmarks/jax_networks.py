"""The networks of ``networks.py`` in JAX, and MAML's query loss on one task; only the child process imports them."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Arrays = dict[str, Any]
MOST_UNROLLED = 10
"""Longer loops use ``lax.scan``, because unrolled ones take minutes to compile."""


def linear(p: Arrays, name: str, x: Any) -> Any:
    """torch.nn.Linear."""
    return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]


def sinusoid_mlp(p: Arrays, x: Any) -> Any:
    """1-40-40-1 with ReLU."""
    return linear(p, "4", jax.nn.relu(linear(p, "2", jax.nn.relu(linear(p, "0", x)))))


def conv4(p: Arrays, x: Any) -> Any:
    """Four convolutional blocks with channels last, which is faster in XLA; the head gets torch's order."""
    x = x.transpose(0, 2, 3, 1)
    for first in (0, 4, 8, 12):
        weight, bias = p[f"{first}.weight"], p[f"{first}.bias"]
        numbers = ("NHWC", "OIHW", "NHWC")
        x = jax.lax.conv_general_dilated(x, weight, (1, 1), ((1, 1), (1, 1)), dimension_numbers=numbers) + bias
        x = (x - x.mean((0, 1, 2))) * jax.lax.rsqrt(x.var((0, 1, 2)) + 1e-5)
        x = jax.nn.relu(x * p[f"{first + 1}.weight"] + p[f"{first + 1}.bias"])
        n, height, width, channels = x.shape
        x = x[:, : height // 2 * 2, : width // 2 * 2].reshape(n, height // 2, 2, width // 2, 2, channels).max((2, 4))
    return linear(p, "17", x.transpose(0, 3, 1, 2).reshape(len(x), -1))


def transformer(p: Arrays, x: Any, heads: int = 4, layers: int = 4) -> Any:
    """Pre-norm blocks with explicit attention."""

    def norm(name: str, x: Any) -> Any:
        centred = x - x.mean(-1, keepdims=True)
        return centred * jax.lax.rsqrt(x.var(-1, keepdims=True) + 1e-5) * p[f"{name}.weight"] + p[f"{name}.bias"]

    x = linear(p, "embed", x) + p["position"]
    size, length, width = x.shape
    for block in (f"blocks.{k}" for k in range(layers)):
        mixed = linear(p, f"{block}.mix", norm(f"{block}.before_attention", x))
        query, key, value = mixed.reshape(size, length, 3, heads, width // heads).transpose(2, 0, 3, 1, 4)
        attention = jax.nn.softmax(query @ key.transpose(0, 1, 3, 2) / (width // heads) ** 0.5)
        x = x + linear(p, f"{block}.out", (attention @ value).transpose(0, 2, 1, 3).reshape(size, length, width))
        hidden = jax.nn.gelu(linear(p, f"{block}.up", norm(f"{block}.before_mlp", x)), approximate=False)
        x = x + linear(p, f"{block}.down", hidden)
    return linear(p, "head", norm("norm", x).mean(1))


def mse(output: Any, y: Any) -> Any:
    """torch's mse_loss."""
    return jnp.square(output - y).mean()


def cross_entropy(output: Any, y: Any) -> Any:
    """torch's cross_entropy of integer classes."""
    return -jnp.take_along_axis(jax.nn.log_softmax(output), y[:, None], 1).mean()


NETWORKS = {"sinusoid_mlp": sinusoid_mlp, "conv4": conv4, "transformer": transformer}
CRITERIA = {"mse": mse, "cross_entropy": cross_entropy}


def query_loss(network: str, loss: str, lr: float, steps: int) -> Callable[..., Any]:
    """Return (weights, support x, support y, query x, query y) -> the loss after ``steps`` of SGD."""
    model, criterion = NETWORKS[network], CRITERIA[loss]

    def objective(p: Arrays, x: Any, y: Any) -> Any:
        return criterion(model(p, x), y)

    def after(p: Arrays, support_x: Any, support_y: Any, query_x: Any, query_y: Any) -> Any:
        def step(phi: Arrays, _: Any) -> tuple[Arrays, None]:
            grads = jax.grad(objective)(phi, support_x, support_y)
            return jax.tree.map(lambda value, grad: value - lr * grad, phi, grads), None

        if steps > MOST_UNROLLED:
            p, _ = jax.lax.scan(step, p, None, steps)
        else:
            for _ in range(steps):
                p, _ = step(p, None)
        return objective(p, query_x, query_y)

    return after
