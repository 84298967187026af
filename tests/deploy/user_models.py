"""Models as a user could write them, most of them wrong."""

import torch
from torch import Tensor, nn


def running_statistics() -> nn.Module:
    return nn.Sequential(nn.Linear(1, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))


def own_statistics() -> nn.Module:
    return nn.Sequential(nn.Linear(1, 4), nn.BatchNorm1d(4, track_running_stats=False), nn.Linear(4, 1))


def dropout() -> nn.Module:
    return nn.Sequential(nn.Linear(1, 64), nn.Dropout(0.5), nn.Linear(64, 1))


def raises() -> nn.Module:
    raise KeyError("no such layer")


class Deaf(nn.Module):
    """Its output does not depend on its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return x + 0 * self.weight


class Endless(nn.Module):
    """Its output is not finite."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight / (0 * x)
