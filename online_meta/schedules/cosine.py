"""Half a cosine from the whole learning rate down to a floor."""

import math

from online_meta.schedules import decay_to_floor
from online_meta.types import Schedule


def cosine(*, rounds: int, floor: float = 0.1, warmup: int = 0) -> Schedule:
    """Return floor + (1 - floor) (1 + cos(pi t / T)) / 2 for t <= T (Loshchilov and Hutter, ICLR 2017, eq. 5).

    The fall takes T = ``rounds`` rounds, 1 or more, and begins after ``warmup`` rounds of a linear rise; a stream has
    no end, so the rate stays at ``floor``, in 0..1, from there on. Raises ``ValueError`` for other numbers.
    """
    return decay_to_floor(lambda t: (1 + math.cos(math.pi * t / rounds)) / 2, rounds, floor, warmup)
