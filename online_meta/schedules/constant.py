"""A constant learning rate."""

from online_meta.types import Schedule


def constant(*, warmup: int = 0) -> Schedule:
    """Return s_t = min(1, (t + 1) / warmup), which is 1 from round ``warmup`` - 1 on.

    Args:
        warmup: number of rounds over which the factor rises, at least 0.

    Returns:
        The schedule.

    Raises:
        ValueError: if ``warmup`` is negative.
    """
    if warmup < 0:
        raise ValueError(f"warmup is {warmup}; it must be at least 0 rounds")
    return lambda round: min(1.0, (round + 1) / max(warmup, 1))
