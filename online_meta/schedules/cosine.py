"""Half a period of a cosine from the full learning rate down to a floor."""

import math

from online_meta.schedules import decay_to_floor
from online_meta.types import Schedule


def cosine(*, rounds: int, floor: float = 0.1, warmup: int = 0) -> Schedule:
    """Return floor + (1 - floor) (1 + cos(pi t / T)) / 2 for t <= T (Loshchilov and Hutter, ICLR 2017, eq. 5).

    t counts from the end of the warm-up. The factor stays at ``floor`` for t > T, because a stream has no end.

    Args:
        rounds: T, the number of rounds over which the factor falls, at least 1.
        floor: the final factor, in [0, 1].
        warmup: number of rounds of the linear rise before, at least 0.

    Returns:
        The schedule.

    Raises:
        ValueError: if an option is out of range.
    """
    return decay_to_floor(lambda t: (1 + math.cos(math.pi * t / rounds)) / 2, rounds, floor, warmup)
