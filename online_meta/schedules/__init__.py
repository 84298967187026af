"""Learning-rate schedules of the outer loop, one a file: each gives, round by round, a share of ``meta.lr``."""

from online_meta.schedules.constant import constant
from online_meta.types import Schedule


def decay_to_floor(shape: Schedule, rounds: int, floor: float, warmup: int) -> Schedule:
    """Return floor + (1 - floor) shape(t), t rounds after a linear rise; in the end ``floor``.

    The rise takes ``warmup`` rounds. ``shape`` goes from 1 at t = 0 to 0 at t = ``rounds``, 1 or more; ``floor`` is a
    share in 0..1. Raises ``ValueError`` for other numbers.
    """
    if rounds < 1 or not 0 <= floor <= 1:
        raise ValueError(f"rounds is {rounds} and floor {floor}: the fall takes 1 round or more, to a share in 0..1")
    warm_up = constant(warmup=warmup)
    return lambda round: warm_up(round) * (floor + (1 - floor) * shape(min(max(round - warmup, 0), rounds)))
