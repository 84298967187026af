"""The step size of online convex optimisation."""

import math

from online_meta.schedules.constant import constant
from online_meta.types import Schedule


def inverse_square_root(*, rounds: int = 1, warmup: int = 0) -> Schedule:
    """Return 1 / sqrt(1 + t / T), the O(1 / sqrt t) step of online gradient descent (Zinkevich, ICML 2003).

    It has halved after 3 T rounds, T = ``rounds``, 1 or more, counted from the end of a linear rise over ``warmup``
    rounds. Raises ``ValueError`` for fewer.
    """
    if rounds < 1:
        raise ValueError(f"rounds is {rounds}: the rate falls over 1 round or more")
    warm_up = constant(warmup=warmup)
    return lambda round: warm_up(round) / math.sqrt(1 + max(round - warmup, 0) / rounds)
