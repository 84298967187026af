"""Small float64 models, each with a task that fits it."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from online_meta.types import Batch, Params, Task

WAYS = 3


class Net(nn.Module):
    """A ``body`` and a ``head``, so that name globs can tell them apart."""

    def __init__(self, body: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.body, self.head = body, head

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


def perceptron(activation: type[nn.Module]) -> nn.Module:
    return Net(nn.Sequential(nn.Linear(4, 7), activation(), nn.Linear(7, 6), activation()), nn.Linear(6, 2))


def layer_norm() -> nn.Module:
    return Net(nn.Sequential(nn.Linear(4, 7), nn.LayerNorm(7), nn.Tanh()), nn.Linear(7, 2))


def conv(norm: nn.Module) -> nn.Module:
    """A convolution, normalisation of its 4 channels, ReLU and max-pooling: a block of Vinyals et al.'s network."""
    body = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), norm, nn.ReLU(), nn.MaxPool2d(2), nn.Flatten())
    return Net(body, nn.Linear(4 * 3 * 3, WAYS))


class Pooled(nn.Module):
    """A layer over the positions of a sequence, and a head over their mean; torch's own attention and recurrence."""

    def __init__(self, body: nn.Module, width: int) -> None:
        super().__init__()
        self.body, self.head = body, nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        found = self.body(x)
        return self.head((found[0] if isinstance(found, tuple) else found).mean(1))


class Attending(nn.MultiheadAttention):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x, x, x, need_weights=False)[0]


MODELS: dict[str, Callable[[], nn.Module]] = {
    "mlp_tanh": lambda: perceptron(nn.Tanh),
    "mlp_relu": lambda: perceptron(nn.ReLU),
    "layer_norm": layer_norm,
    "conv_group_norm": lambda: conv(nn.GroupNorm(2, 4)),
    "conv_batch_norm": lambda: conv(nn.BatchNorm2d(4, track_running_stats=False)),
    "conv_layer_norm": lambda: conv(nn.LayerNorm([4, 6, 6])),
    "conv_instance_norm": lambda: conv(nn.InstanceNorm2d(4, affine=True)),
    "sequence_attention": lambda: Pooled(Attending(3, 1, batch_first=True), 3),
    "sequence_torch_gru": lambda: Pooled(nn.GRU(3, 4, batch_first=True), 4),
}
"""Models that are functions of their weights and x."""

RANDOM: dict[str, Callable[[], nn.Module]] = {
    "mlp_dropout": lambda: nn.Sequential(nn.Linear(4, 9), nn.Tanh(), nn.Dropout(0.3), nn.Linear(9, 2)),
    "conv_dropout": lambda: Net(
        nn.Sequential(nn.Conv2d(2, 4, 3), nn.Dropout2d(0.4), nn.ReLU(), nn.Flatten()), nn.Linear(64, WAYS)
    ),
}
"""Models that draw random numbers as they learn."""

EVERY = MODELS | RANDOM


class Problem(NamedTuple):
    """A module in float64, the name of its loss, and a maker of tasks: (seed, support size, query size) -> Task."""

    module: nn.Module
    loss: str
    task: Callable[..., Task]

    def weights(self) -> Params:
        return {name: weight.detach().clone() for name, weight in self.module.named_parameters()}


def problem(name: str, seed: int = 0, models: Mapping[str, Callable[[], nn.Module]] = EVERY) -> Problem:
    """Return the problem called ``name``; its parameters are drawn anew so that no bias or scale is special."""
    torch.manual_seed(seed)
    module = models[name]().double()
    with torch.no_grad():
        for weight in module.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    loss, task = TASKS[name.partition("_")[0]]
    return Problem(module, loss, task)


def regression_task(seed: int = 0, support: int = 5, query: int = 4) -> Task:
    """Two sines of a random projection of x, (n, 4) -> (n, 2)."""
    random = torch.Generator().manual_seed(1000 + seed)
    projection = torch.randn(4, 2, generator=random, dtype=torch.float64)

    def batch(size: int) -> Batch:
        x = torch.randn(size, 4, generator=random, dtype=torch.float64)
        return Batch(x, torch.sin(x @ projection))

    return Task(batch(support), batch(query))


def image_task(seed: int = 0, support: int = 6, query: int = 5) -> Task:
    """Noisy images around one random image a class, (n, 2, 6, 6), with int64 labels (n,)."""
    random = torch.Generator().manual_seed(2000 + seed)
    centres = torch.randn(WAYS, 2, 6, 6, generator=random, dtype=torch.float64)

    def batch(size: int) -> Batch:
        y = torch.arange(size) % WAYS
        return Batch(centres[y] + 0.5 * torch.randn(size, 2, 6, 6, generator=random, dtype=torch.float64), y)

    return Task(batch(support), batch(query))


def sequence_task(seed: int = 0, support: int = 5, query: int = 4) -> Task:
    """Two sines of a random projection of a sequence, (n, 5, 3) -> (n, 2)."""
    random = torch.Generator().manual_seed(3000 + seed)
    projection = torch.randn(15, 2, generator=random, dtype=torch.float64)

    def batch(size: int) -> Batch:
        x = torch.randn(size, 5, 3, generator=random, dtype=torch.float64)
        return Batch(x, torch.sin(x.flatten(1) @ projection))

    return Task(batch(support), batch(query))


def token_task(seed: int = 0, support: int = 6, query: int = 5) -> Task:
    """Random tokens, int64 (n, 5) in 0..6, with int64 labels (n,)."""
    random = torch.Generator().manual_seed(4000 + seed)

    def batch(size: int) -> Batch:
        return Batch(torch.randint(7, (size, 5), generator=random), torch.arange(size) % WAYS)

    return Task(batch(support), batch(query))


TASKS: dict[str, tuple[str, Callable[..., Task]]] = {
    "mlp": ("mse", regression_task),
    "layer": ("mse", regression_task),
    "conv": ("cross_entropy", image_task),
    "sequence": ("mse", sequence_task),
    "tokens": ("cross_entropy", token_task),
}
"""The loss and the tasks of a model, by the first word of its name."""
