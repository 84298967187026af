"""The learning rate as it is."""

from online_meta.types import Schedule


def constant(*, warmup: int = 0) -> Schedule:
    """Return s_t = min(1, (t + 1) / warmup), which is 1 from round ``warmup`` - 1 on.

    ``warmup`` is a number of rounds, 0 or more. Raises ``ValueError`` for fewer.
    """
    if warmup < 0:
        raise ValueError(f"warmup is {warmup}: it is a number of rounds, 0 or more")
    return lambda round: min(1.0, (round + 1) / max(warmup, 1))
