"""A random walk whose place at any time is found without walking there."""

import math

from online_meta.draws import generator


def random_walk(*key: int, t: int) -> float:
    """Return W(t) of the walk called ``key``: W(0) = 0, independent increments of normal distribution N(0, 1).

    It is a pure function, in O(log t) draws: W at the powers of two first, then at midpoints given both ends, which are
    N((W(a) + W(b)) / 2, (b - a) / 4) (the construction of Brownian motion by Levy, 1948).
    """
    if t == 0:
        return 0.0
    low, high, left, right = 0, 1, 0.0, _normal(key, 1)
    while high < t:
        low, left = high, right
        high *= 2
        right = left + math.sqrt(high - low) * _normal(key, high)
    while high > t:
        middle = (low + high) // 2
        value = (left + right) / 2 + math.sqrt((high - low) / 4) * _normal(key, middle)
        low, left, high, right = (low, left, middle, value) if t <= middle else (middle, value, high, right)
    return right


def _normal(key: tuple[int, ...], time: int) -> float:
    return float(generator(*key, time).standard_normal())


def reflect(value: float) -> float:
    """Return where ``value`` is when 0 and 1 are mirrors: in 0 .. 1, and as far as before from a step so short."""
    rest = value % 2.0
    return min(rest, 2.0 - rest)
