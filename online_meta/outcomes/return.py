"""The return of a task that is an environment: the output is what is to be made large."""  # noqa: N999

from functools import cache

import torch

from online_meta.outcomes._totals import build_total
from online_meta.types import Outcome, Tensors


@cache  # Outcomes are one family if their functions are the same.
def build() -> Outcome:
    """Return the loss of a row as minus the sum of its outputs, for example of the rewards of an episode.

    The targets y are not compared with anything; only their number is checked. Several outputs are averaged.
    """
    return build_total("return", -1)


def example(n: int) -> tuple[Tensors, Tensors]:
    """Return the rewards of n episodes of three steps each."""
    random = torch.Generator().manual_seed(0)
    return torch.randn(n, 3, generator=random, dtype=torch.float64), torch.zeros(n, dtype=torch.float64)
