"""A straight line from the full learning rate down to a floor."""

from online_meta.schedules import decay_to_floor
from online_meta.types import Schedule


def linear(*, rounds: int, floor: float = 0.1, warmup: int = 0) -> Schedule:
    """Return max(floor, 1 - (1 - floor) t / T).

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
    return decay_to_floor(lambda t: 1 - t / rounds, rounds, floor, warmup)
