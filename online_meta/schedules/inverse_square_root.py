"""The step size of online convex optimisation."""

import math

from online_meta.schedules.constant import constant
from online_meta.types import Schedule


def inverse_square_root(*, rounds: int = 1, warmup: int = 0) -> Schedule:
    """Return 1 / sqrt(1 + t / T), the O(1 / sqrt t) step of online gradient descent (Zinkevich, ICML 2003).

    t counts from the end of the warm-up. The factor is 1/2 at t = 3 T.

    Args:
        rounds: T, the time scale of the decrease in rounds, at least 1.
        warmup: number of rounds of the linear rise before, at least 0.

    Returns:
        The schedule.

    Raises:
        ValueError: if an option is out of range.
    """
    if rounds < 1:
        raise ValueError(f"rounds is {rounds}; it must be at least 1")
    warm_up = constant(warmup=warmup)
    return lambda round: warm_up(round) / math.sqrt(1 + max(round - warmup, 0) / rounds)
