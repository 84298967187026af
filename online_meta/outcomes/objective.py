"""The objective of a task that is a function: the output is what is to be made small."""

from functools import cache

import torch

from online_meta.outcomes._totals import build_total
from online_meta.types import Outcome, Tensors


@cache  # Outcomes are one family if their functions are the same.
def build() -> Outcome:
    """Return the loss of a row as the sum of its outputs, for example the function's values along a trajectory.

    The targets y are not compared with anything; only their number is checked. Several outputs are averaged.
    """
    return build_total("objective", 1)


def example(n: int) -> tuple[Tensors, Tensors]:
    """Return the values of n functions at three points each."""
    random = torch.Generator().manual_seed(0)
    return torch.randn(n, 3, generator=random, dtype=torch.float64), torch.zeros(n, dtype=torch.float64)
