"""Reservoir replay: revisit a uniform sample of the past in bounded memory."""

from typing import Annotated

import numpy as np
from annotated_types import Ge
from numpy.typing import NDArray

from online_meta.replay import (
    ReplayPolicy,
    ReplayRequest,
    ReplaySample,
    among_rounds,
    hash_rounds,
    pack_memory,
    request_generator,
    rounds_from,
    sample_uniformly,
)
from online_meta.types import Params


def update_sample(memory: Params, request: ReplayRequest, size: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the rounds of the updated sample, and the index that each had in ``memory``, or -1 if it is new.

    The rounds with the ``size`` smallest hashes are a uniform sample without replacement of all rounds so far. Unlike
    Vitter's reservoir (1985), the sample is a function of the rounds and the seed only.
    """
    old = memory["rounds"].numpy()
    kept = np.flatnonzero(among_rounds(request.rounds, old))
    new = rounds_from(request.rounds, int(memory["next"]))
    rounds = np.concatenate([old[kept], new])
    places = np.concatenate([kept, np.full(len(new), -1, np.int64)])
    if len(rounds) > size:
        lowest = np.sort(np.argpartition(hash_rounds(request.seed, rounds), size)[:size])
        rounds, places = rounds[lowest], places[lowest]
    return rounds, places


def reservoir(size: Annotated[int, Ge(1)] = 1000) -> ReplayPolicy:
    """Return the policy that draws distinct rounds uniformly from a reservoir of ``size`` rounds (Vitter, 1985).

    The reservoir is always a uniform sample of all rounds so far, so a draw is unbiased for the mean over all rounds.
    The rounds that are revisited fit into a cache, however long the history is.

    Args:
        size: the number of rounds in the reservoir, at least 1.

    Returns:
        The policy.

    Raises:
        ValueError: if ``size`` is below 1.
    """
    if size < 1:
        raise ValueError(f"size is {size}; the reservoir must hold at least 1 round")

    def start() -> Params:
        return pack_memory(0, np.array([], np.int64))

    def begin_round(memory: Params, request: ReplayRequest) -> Params:
        rounds, _ = update_sample(memory, request, size)
        return pack_memory(request.round + 1, rounds)

    def sample(memory: Params, request: ReplayRequest) -> list[ReplaySample]:
        return [
            ReplaySample(round)
            for round in sample_uniformly(memory["rounds"].numpy(), request.batch, request_generator(request))
        ]

    return ReplayPolicy(sample, start, begin_round)
