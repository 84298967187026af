"""Half a cosine from the whole learning rate down to a floor."""

import math

from online_meta.schedules.constant import constant
from online_meta.types import Schedule


def cosine(*, rounds: int, floor: float = 0.1, warmup: int = 0) -> Schedule:
    """Return floor + (1 - floor) (1 + cos(pi t / T)) / 2 for t <= T (Loshchilov and Hutter, ICLR 2017, eq. 5).

    The fall takes T = ``rounds`` rounds, 1 or more, and begins after ``warmup`` rounds of a linear rise; a stream has
    no end, so the rate stays at ``floor``, in 0..1, from there on. Raises ``ValueError`` for other numbers.
    """
    if rounds < 1 or not 0 <= floor <= 1:
        raise ValueError(f"rounds is {rounds} and floor {floor}: the fall takes 1 round or more, to a share in 0..1")
    rise = constant(warmup=warmup)

    def share(round: int) -> float:
        fallen = min(max(round - warmup, 0) / rounds, 1.0)
        return rise(round) * (floor + (1 - floor) * (1 + math.cos(math.pi * fallen)) / 2)

    return share
