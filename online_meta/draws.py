"""Which past rounds a meta-step revisits: what a replay policy is asked, and what it answers."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np


class Draw(NamedTuple):
    """A question to a replay policy: a meta-batch of at most ``batch`` of the rounds 0..``count`` - 1.

    ``seed``, ``round`` (the newest round, count - 1) and ``step`` (of this round's meta-steps, from 0)
    name the draw: the answer is a pure function of the five numbers.
    """

    seed: int
    round: int
    step: int
    count: int  # type: ignore[assignment]  # hides tuple.count, which a question has no use for
    batch: int


class Pick(NamedTuple):
    """A past round and its weight in the meta-batch's weighted mean."""

    round: int
    weight: float


Replay = Callable[[Draw], list[Pick]]
"""A replay policy; the expected weighted mean of its picks' gradients should be that of all rounds."""


def generator(*key: int) -> np.random.Generator:
    """Return a random generator that is a pure function of the non-negative integers of ``key``."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))
