"""Streams of samples whose tasks change where they are known to."""

import torch
from torch import Tensor

Samples = list[tuple[Tensor, Tensor]]


def draw_lines(seed: int, lengths: list[int], noise: float = 0.1) -> Samples:
    """Return runs of y = a x + b + noise, x of two numbers in [-1, 1], whose a is new and whose b jumps in each run."""
    random = torch.Generator().manual_seed(seed)
    found = []
    for run, length in enumerate(lengths):
        weights, offset = 3 * torch.randn(2, generator=random), 5.0 * (-1) ** run
        for _ in range(length):
            x = 2 * torch.rand(2, generator=random) - 1
            found.append((x, x @ weights + offset + noise * torch.randn(1, generator=random)))
    return found


def draw_classes(seed: int, lengths: list[int], ways: int = 3) -> Samples:
    """Return runs of samples of two numbers around the centres of their classes, which jump in each run."""
    random = torch.Generator().manual_seed(seed)
    found = []
    for run, length in enumerate(lengths):
        centres = 2 * torch.randn(ways, 2, generator=random) + 5.0 * (-1) ** run
        for _ in range(length):
            y = torch.randint(ways, (), generator=random)
            found.append((centres[y] + 0.5 * torch.randn(2, generator=random), y))
    return found
