"""Reservoir replay: a fair sample of the past, in bounded memory."""

from typing import Annotated

import numpy as np
from annotated_types import Ge

from online_meta.draws import (
    ReplayPolicy,
    ReplayRequest,
    ReplaySample,
    pack_memory,
    request_generator,
    sample_uniformly,
)
from online_meta.replay._reservoir import update_sample
from online_meta.types import Params


def reservoir(size: Annotated[int, Ge(1)] = 1000) -> ReplayPolicy:
    """Return the policy that draws distinct rounds uniformly from a reservoir of ``size`` rounds (Vitter, 1985).

    The reservoir is at any time a uniform sample of all rounds so far, so a draw is unbiased for the mean over all
    rounds; what is revisited stays small enough for a cache, however long the history.

    Raises ``ValueError`` when ``size`` is below 1.
    """
    if size < 1:
        raise ValueError(f"size is {size}: the reservoir holds 1 round or more")

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
