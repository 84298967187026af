"""A straight line from the whole learning rate down to a floor."""

from online_meta.schedules import decay_to_floor
from online_meta.types import Schedule


def linear(*, rounds: int, floor: float = 0.1, warmup: int = 0) -> Schedule:
    """Return max(floor, 1 - (1 - floor) t / T).

    The fall takes T = ``rounds`` rounds, 1 or more, and begins after ``warmup`` rounds of a linear rise; a stream has
    no end, so the rate stays at ``floor``, in 0..1, from there on. Raises ``ValueError`` for other numbers.
    """
    return decay_to_floor(lambda t: 1 - t / rounds, rounds, floor, warmup)
