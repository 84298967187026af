"""What the sources that read from a broker share."""

PREFETCH_BYTES = 16 * 1024 * 1024
"""How many bytes of tasks a source asks its broker for at once, where it can know beforehand."""


def next_fetch_count(max_count: int, sizes: list[int]) -> int:
    """Return how many entries to ask for next, given the sizes in bytes of those that came last, 1 to ``max_count``."""
    return max(1, min(max_count, PREFETCH_BYTES // max([*sizes, 1])))
