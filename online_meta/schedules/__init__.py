"""Learning-rate schedules of the outer loop, one per file: the factor of ``meta.lr`` in each round.

A file NAME.py defines a function NAME(**options) -> ``Schedule``; the registry finds it by its file name. Files whose
names begin with _ are not entries.

- All options are keyword-only. Each schedule has the option ``warmup``: the number of rounds, at least 0 (the default),
  over which the factor rises linearly to 1. After the warm-up the schedule is the same as without one, shifted by it.
- The function raises ``ValueError`` for an option out of range.
- The schedule is a pure function of the round, an integer from 0, and returns a float in (0, 1], and 0 only if an
  option asks for it (floor = 0). Without a warm-up it is 1 in round 0 and never increases. It is defined for all
  rounds: a stream has no end.
"""

from online_meta.schedules.constant import constant
from online_meta.types import Schedule


def decay_to_floor(shape: Schedule, rounds: int, floor: float, warmup: int) -> Schedule:
    """Return the schedule floor + (1 - floor) shape(t), t rounds after the warm-up; ``floor`` after ``rounds`` rounds.

    ``shape`` decreases from 1 at t = 0 to 0 at t = ``rounds``. Raises ``ValueError`` if ``rounds`` is below 1,
    ``floor`` is outside [0, 1] or ``warmup`` is negative.
    """
    if rounds < 1 or not 0 <= floor <= 1:
        raise ValueError(f"rounds is {rounds} and floor is {floor}; rounds must be at least 1, and floor in [0, 1]")
    warm_up = constant(warmup=warmup)
    return lambda round: warm_up(round) * (floor + (1 - floor) * shape(min(max(round - warmup, 0), rounds)))
