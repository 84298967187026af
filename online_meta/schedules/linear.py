"""A straight line from the whole learning rate down to a floor."""

from online_meta.schedules.constant import constant
from online_meta.types import Schedule


def linear(*, rounds: int, floor: float = 0.1, warmup: int = 0) -> Schedule:
    """Return max(floor, 1 - (1 - floor) t / T).

    The fall takes T = ``rounds`` rounds, 1 or more, and begins after ``warmup`` rounds of a linear rise; a stream has
    no end, so the rate stays at ``floor``, in 0..1, from there on. Raises ``ValueError`` for other numbers.
    """
    if rounds < 1 or not 0 <= floor <= 1:
        raise ValueError(f"rounds is {rounds} and floor {floor}: the fall takes 1 round or more, to a share in 0..1")
    rise = constant(warmup=warmup)
    return lambda round: rise(round) * max(floor, 1 - (1 - floor) * max(round - warmup, 0) / rounds)
