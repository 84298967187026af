"""Replay policies, one per file: choose the past rounds that a meta-step revisits.

A file NAME.py defines a function NAME(**options) -> ``ReplayPolicy``; the registry finds it by its file name. Files
whose names begin with _ are not entries.

- Each option has a default, and a type of ``Annotated`` with its range (annotated_types) or ``Literal``; the
  configuration is checked against them. The function raises ``ValueError`` for a value out of range.
- All functions of a policy are pure: their arguments determine the result, and they do not write to them. Random
  numbers come from ``request_generator(request)``, so a draw can be repeated.
- ``sample`` returns distinct rounds out of ``request.rounds``, at most ``request.batch`` of them unless the policy's
  docstring says otherwise, all with positive weight. If all rounds fit into a batch, all are revisited with equal
  weight.
- The weights make the expected meta-step that of the mean over all rounds, or the docstring says which mean it is.
- The memory is a flat dict of tensors with a bounded size, which is saved and restored with the learner. Rounds can
  disappear from ``request.rounds``; a policy must not return them.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from online_meta.types import MetaGrad, Params


class ReplayRequest(NamedTuple):
    """A request for a meta-batch of at most ``batch`` of the past ``rounds``, which are in ascending order.

    ``seed``, ``round`` (the newest round) and ``step`` (of this round's meta-steps, from 0) identify the draw.
    """

    seed: int
    round: int
    step: int
    rounds: Sequence[int]
    batch: int


class ReplaySample(NamedTuple):
    """A past round with its ``weight`` and ``share``: a meta-step uses sum(weight * gradient) / sum(share).

    A share is the number of times that the round was drawn, usually 1. The expected step is that of the mean over all
    rounds if (expected weight of a round) / (sum of shares) = 1 / len(rounds).
    """

    round: int
    weight: float = 1.0
    share: float = 1.0


class ReplayPolicy(NamedTuple):
    """A replay policy as pure functions; ``memory`` is a dict of tensors that is saved with the learner.

    ``sample(memory, request) -> samples`` draws a meta-batch. The others are optional:
    ``start() -> memory`` returns the initial memory;
    ``begin_round(memory, request) -> memory`` updates the memory before the first draw of a round;
    ``measure(gradient) -> values`` returns what the policy measures of each drawn round's meta-gradient, a vector of
    shape (values,); the gradients of a meta-batch are then computed one by one;
    ``record(memory, request, rounds, values) -> memory`` updates the memory after a draw; ``values`` has shape
    (rounds, values), float64, and is NaN for a gradient that was not finite.
    """

    sample: Callable[[Params, ReplayRequest], list[ReplaySample]]
    start: Callable[[], Params] = dict
    begin_round: Callable[[Params, ReplayRequest], Params] = lambda memory, request: memory
    measure: Callable[[MetaGrad], Tensor] | None = None
    record: Callable[[Params, ReplayRequest, list[int], Tensor], Params] = lambda memory, request, rounds, values: (
        memory
    )


def generator(*key: int) -> np.random.Generator:
    """Return a random generator that depends only on ``key``, which are non-negative integers."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))


def request_generator(request: ReplayRequest) -> np.random.Generator:
    """Return the random generator of a draw, a function of its seed, round and step."""
    return generator(request.seed, request.round, request.step)


def sample_uniformly(rounds: Sequence[int] | NDArray[np.int64], count: int, random: np.random.Generator) -> list[int]:
    """Draw min(count, len(rounds)) distinct ``rounds`` uniformly; return all of them in order if they fit."""
    most = len(rounds)
    if most <= count:
        return [int(round) for round in rounds]
    # Redrawing duplicates needs O(count) memory; a permutation would need O(len(rounds)).
    chosen: dict[int, None] = {}
    while len(chosen) < count:  # Numbers drawn together are those that would be drawn one by one.
        chosen |= dict.fromkeys(random.integers(most, size=count - len(chosen)).tolist())
    if isinstance(rounds, range) and rounds.start == 0 and rounds.step == 1:
        return [*chosen]
    return [int(rounds[index]) for index in chosen]


def sample_systematically(
    probabilities: NDArray[np.float64], count: int, random: np.random.Generator
) -> list[tuple[int, int]]:
    """Draw ``count`` hits by systematic sampling (Madow, 1949); return (index, hits) for every index that was hit.

    The expected number of hits of an index is count * probabilities[index] / sum(probabilities), and the actual one
    differs from it by less than 1. The order is shuffled first, so that neighbours are not drawn together more often.
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
    """Return the rounds from ``first`` on, in ascending order, found by binary search."""
    low, high = 0, len(rounds)
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if rounds[middle] < first else (low, middle)
    return np.array(rounds[low:], np.int64)


def among_rounds(rounds: Sequence[int], asked: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return a mask that says which of ``asked`` are among ``rounds``."""
    if isinstance(rounds, range):
        return (asked >= rounds.start) & (asked < rounds.stop)
    return np.isin(asked, np.asarray(rounds))


def pack_memory(next: int, rounds: NDArray[np.int64], **others: NDArray[np.generic]) -> Params:
    """Return a memory with the arrays ``rounds`` and ``others``, and with ``next``, the first round not yet in it."""
    arrays = {"next": np.array(next, np.int64), "rounds": rounds, **others}
    return {name: torch.from_numpy(np.array(values)) for name, values in arrays.items()}
