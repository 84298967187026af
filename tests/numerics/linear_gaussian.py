"""Linear regression with known noise and a normal prior, where beliefs have a closed form."""

from itertools import cycle

import torch

import online_meta as om
from online_meta.functional import normals

NOISE, PRIOR = 0.7, 0.8
"""The standard deviations of the noise and of the prior of each weight."""


def setting(inputs, rule, steps):
    """Return an inner loop on y = inputs w + noise, initial weights, and targets (n, 1)."""
    module = torch.nn.Linear(inputs.shape[1], 1, bias=False).double()
    inner = om.Inner(om.model_loss(module, "gaussian_of_noise", loss_options={"sigma": NOISE}), rule, steps)
    random = torch.Generator().manual_seed(3)
    mean = torch.randn(1, inputs.shape[1], generator=random, dtype=torch.float64)
    targets = torch.randn(len(inputs), 1, generator=random, dtype=torch.float64)
    return inner, {"weight": mean}, targets


def draw_sigma_points(monkeypatch, size):
    """Replace normal numbers by +-sqrt(d) e_i in turn: of 2 d draws, the mean of a quadratic function is exact."""
    points = (size**0.5) * torch.eye(size, dtype=torch.float64)
    turns = cycle([*points, *-points])
    monkeypatch.setattr(
        normals, "normal_like_all", lambda tensors: {n: next(turns).reshape(v.shape) for n, v in tensors.items()}
    )
    return 2 * size
