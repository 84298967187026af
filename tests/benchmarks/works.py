"""The workloads: networks, tasks, contestants and goals."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import nn

from online_meta.types import Batch, Params, Task
from tests.benchmarks.networks import Transformer, conv4, sinusoid_mlp


class Goal(NamedTuple):
    """``contestant`` takes at most ``most`` times the ``measure`` ("seconds" or "bytes") of ``peer``."""

    contestant: str
    measure: str
    peer: str
    most: float


class Work(NamedTuple):
    """A workload: MAML's meta-gradient over ``tasks`` tasks, with ``steps`` steps of SGD with rate ``lr``.

    Only ``timed`` of the tasks are run. If these are fewer, the time is scaled up to ``tasks``, because all contestants
    process one task at a time. ``network`` is the name in ``jax_networks``.
    """

    name: str
    title: str
    network: str
    module: Callable[[], nn.Module]
    loss: str
    lr: float
    steps: int
    tasks: int
    timed: int
    task: Callable[[int], Task]
    contestants: tuple[str, ...]
    goals: tuple[Goal, ...]
    rounds: int
    reference: str = "unrolled"

    def weights(self) -> Params:
        """Return random weights that are the same for every contestant."""
        torch.manual_seed(0)
        return {name: value.detach().clone() for name, value in self.module().named_parameters()}


def sinusoid_task(seed: int) -> Task:
    """Return a task y = a sin(x + b) with ten support and ten query points."""
    random = torch.Generator().manual_seed(seed)
    size, shift = 0.1 + 4.9 * torch.rand(1, generator=random), 3.14159 * torch.rand(1, generator=random)

    def batch() -> Batch:
        x = 10 * torch.rand(10, 1, generator=random) - 5
        return Batch(x, size * torch.sin(x + shift))

    return Task(batch(), batch())


def image_task(ways: int, shots: int, queries: int, seed: int, side: int = 84) -> Task:
    """Return a task of noisy copies of one random image per class, (n, 3, side, side)."""
    random = torch.Generator().manual_seed(seed)
    centres = torch.randn(ways, 3, side, side, generator=random)

    def batch(each: int) -> Batch:
        y = torch.arange(ways).repeat(each)
        return Batch(centres[y] + torch.randn(len(y), 3, side, side, generator=random), y)

    return Task(batch(shots), batch(queries))


def sequence_task(size: int, length: int, features: int, seed: int) -> Task:
    """Return a task with sequences (size, length, features); y is the sine of a projection of their mean."""
    random = torch.Generator().manual_seed(seed)
    projection = torch.randn(features, 1, generator=random)

    def batch() -> Batch:
        x = torch.randn(size, length, features, generator=random)
        return Batch(x, torch.sin(length**0.5 * x.mean(1) @ projection))

    return Task(batch(), batch())


def _make_sinusoid(steps: int) -> Work:
    ways = ("ours, compiled", "ours, traced", "ours, vmap", "ours, loop")
    return Work(
        f"sinusoid_k{steps}",
        f"Sinusoid, MLP 1-40-40-1, 25 tasks of 10 + 10 points, K = {steps}",
        "sinusoid_mlp",
        sinusoid_mlp,
        "mse",
        0.01,
        steps,
        25,
        25,
        sinusoid_task,
        (*ways, "unrolled", "higher", "torchopt", "JAX"),
        (Goal(ways[0], "seconds", "unrolled", 0.015), Goal(ways[0], "seconds", "JAX", 0.7)),
        rounds=15,
    )


def _make_conv4(
    name: str,
    ways: int,
    shots: int,
    queries: int,
    tasks: int,
    timed: int,
    most: float,
    *,
    rounds: int,
    reference: str = "unrolled",
) -> Work:
    ours = "ours, loop"
    return Work(
        name,
        f"Conv4-64 with BatchNorm, 84x84x3, {ways}-way {shots}-shot, {queries} query images per class, "
        f"{tasks} tasks, K = 5",
        "conv4",
        partial(conv4, ways),
        "cross_entropy",
        0.01,
        5,
        tasks,
        timed,
        partial(image_task, ways, shots, queries),
        (ours, "unrolled", "JAX"),
        (Goal(ours, "seconds", "unrolled", most), Goal(ours, "bytes", "unrolled", 0.5)),
        rounds=rounds,
        reference=reference,
    )


def _make_group_norm() -> Work:
    """Return the work on 75 query images with GroupNorm, which computes each image by itself; JAX has no such net."""
    plain = WORKS_OF_CONV4[0]
    whole, chunks = "ours, loop", "ours, 25 queries at a time"
    return plain._replace(
        name="conv4_5way_group_norm",
        title=plain.title.replace("BatchNorm", "GroupNorm"),
        module=partial(conv4, 5, groups=8),
        contestants=(whole, chunks, "unrolled"),
        goals=(Goal(chunks, "seconds", "unrolled", 1.1), Goal(chunks, "bytes", "unrolled", 0.5)),
    )


FEATURES, LENGTH, SIZE = 16, 32, 8


def transformer(steps: int) -> Work:
    """Return the workload of the transformer with ``steps`` inner steps."""
    ours, again = "ours, loop", "ours, rematerialised"
    return Work(
        f"transformer_k{steps}",
        f"Transformer, 4 layers of width 256, 4 heads, {SIZE} + {SIZE} sequences of {LENGTH}, 1 task, K = {steps}",
        "transformer",
        partial(Transformer, FEATURES, LENGTH, width=256, heads=4, hidden=1024, layers=4),
        "mse",
        0.01,
        steps,
        1,
        1,
        partial(sequence_task, SIZE, LENGTH, FEATURES),
        (ours, again, "unrolled", "JAX"),
        (
            Goal(ours, "seconds", "unrolled", 1.3),
            Goal(ours, "bytes", "unrolled", 0.28),
            Goal(again, "seconds", "unrolled", 1.8),
            Goal(again, "bytes", "unrolled", 0.17),
        ),
        rounds=3,
    )


WORKS_OF_CONV4 = (
    _make_conv4("conv4_5way_4tasks", 5, 1, 15, 4, 4, 1.0, rounds=4),
    _make_conv4("conv4_5way_few_queries", 5, 1, 1, 4, 4, 1.0, rounds=4),
    _make_conv4("conv4_5way_32tasks", 5, 1, 15, 32, 8, 1.0, rounds=2),
    _make_conv4("conv4_20way_4tasks", 20, 5, 5, 4, 1, 1.1, rounds=2, reference="adjoint"),
)
WORKS = {
    work.name: work for work in (*map(_make_sinusoid, (1, 5, 10)), *WORKS_OF_CONV4, _make_group_norm(), transformer(32))
}
