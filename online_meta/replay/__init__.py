"""Replay policies: which past rounds a meta-step revisits, one a file."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from online_meta.types import MetaGrad, Params


class ReplayRequest(NamedTuple):
    """A question to a replay policy: a meta-batch of at most ``batch`` of the past ``rounds``, in ascending order.

    ``seed``, ``round`` (the newest round) and ``step`` (of this round's meta-steps, from 0) name the draw.
    """

    seed: int
    round: int
    step: int
    rounds: Sequence[int]
    batch: int


class ReplaySample(NamedTuple):
    """A past round with its ``weight`` and ``share``: a meta-step goes by sum(weight * gradient) / sum(share).

    Shares count draws: 1, or more for a round that was drawn more than once. That the expected step is that of the
    mean over all rounds is up to the weights: (expected weight of a round) / (sum of shares) is then 1 / len(rounds).
    """

    round: int
    weight: float = 1.0
    share: float = 1.0


class ReplayPolicy(NamedTuple):
    """A replay policy as pure functions; ``memory`` are named tensors, saved with the learner.

    ``sample(memory, request) -> samples`` answers a draw. What a policy does not need it leaves out:
    ``start() -> memory`` makes what it remembers to begin with;
    ``begin_round(memory, request) -> memory`` is called before the first of a round's draws, with that draw;
    ``measure(gradient) -> (values,)`` says what the policy wants to know of a round's meta-gradient, of the draws that
    it is part of; meta-gradients are then taken one by one;
    ``record(memory, request, rounds, values) -> memory`` is told so after the draw: ``values`` is (rounds, values), NaN
    where a gradient was not finite.
    """

    sample: Callable[[Params, ReplayRequest], list[ReplaySample]]
    start: Callable[[], Params] = dict
    begin_round: Callable[[Params, ReplayRequest], Params] = lambda memory, request: memory
    measure: Callable[[MetaGrad], Tensor] | None = None
    record: Callable[[Params, ReplayRequest, list[int], Tensor], Params] = lambda memory, request, rounds, values: (
        memory
    )


def generator(*key: int) -> np.random.Generator:
    """Return a random generator that is a pure function of the non-negative integers of ``key``."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))


def request_generator(request: ReplayRequest) -> np.random.Generator:
    """Return the random generator of a draw."""
    return generator(request.seed, request.round, request.step)


def sample_uniformly(rounds: Sequence[int] | NDArray[np.int64], count: int, random: np.random.Generator) -> list[int]:
    """Return min(many, len(rounds)) distinct ones of ``rounds``, each set of them as likely as any other."""
    if len(rounds) <= count:
        return [int(round) for round in rounds]
    # Drawing without replacement would cost O(count) memory by permutation; a set of redraws does not.
    chosen: dict[int, None] = {}
    while len(chosen) < count:
        chosen.setdefault(int(random.integers(len(rounds))))
    return [int(rounds[index]) for index in chosen]


def sample_systematically(
    probabilities: NDArray[np.float64], count: int, random: np.random.Generator
) -> list[tuple[int, int]]:
    """Return (index, hits) of ``count`` hits by systematic sampling (Madow, 1949), those without a hit left out.

    The expected hits of an index are many * chances[index] / sum(chances), and the hits differ from it by less than 1.
    The order is shuffled first, so that neighbours are not drawn together more often than others.
    """
    order = random.permutation(len(probabilities))
    ends = np.cumsum(probabilities[order])
    points = (np.arange(count) + random.random()) * (ends[-1] / count)
    found = np.minimum(np.searchsorted(ends, points, side="right"), len(order) - 1)
    return [(int(order[at]), int(hits)) for at, hits in zip(*np.unique(found, return_counts=True), strict=True)]


def hash_rounds(seed: int, rounds: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Return a hash of each round, uniform over 64 bits (the finalizer of SplitMix64, Steele et al., 2014)."""
    start = np.uint64(generator(seed).integers(2**63))
    with np.errstate(over="ignore"):
        mixed = start + (rounds.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def rounds_from(rounds: Sequence[int], first: int) -> NDArray[np.int64]:
    """Return the rounds from ``first`` on, in ascending order; costs no more than their number, and a search."""
    low, high = 0, len(rounds)
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if rounds[middle] < first else (low, middle)
    return np.array(rounds[low:], np.int64)


def among_rounds(rounds: Sequence[int], asked: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return which of ``asked`` are among ``rounds``."""
    if isinstance(rounds, range):
        return (asked >= rounds.start) & (asked < rounds.stop)
    return np.isin(asked, np.asarray(rounds))


def pack_memory(next: int, rounds: NDArray[np.int64], **others: NDArray[np.generic]) -> Params:
    """Return a memory of ``rounds`` and other arrays, and of the ``next`` round that is not in it yet."""
    arrays = {"next": np.array(next, np.int64), "rounds": rounds, **others}
    return {name: torch.from_numpy(np.array(values)) for name, values in arrays.items()}
