"""Reservoir replay: a fair sample of the past, in bounded memory."""

from typing import Annotated

import numpy as np
from annotated_types import Ge

from online_meta.draws import Draw, Pick, Replay, as_memory, draw_random, pick_evenly
from online_meta.replay._reservoir import sample_on
from online_meta.types import Params


def reservoir(size: Annotated[int, Ge(1)] = 1000) -> Replay:
    """Return the policy that draws distinct rounds uniformly from a reservoir of ``size`` rounds (Vitter, 1985).

    The reservoir is at any time a uniform sample of all rounds so far, so a draw is unbiased for the mean over all
    rounds; what is revisited stays small enough for a cache, however long the history.

    Raises ``ValueError`` when ``size`` is below 1.
    """
    if size < 1:
        raise ValueError(f"size is {size}: the reservoir holds 1 round or more")

    def start() -> Params:
        return as_memory(0, np.array([], np.int64))

    def meet(memory: Params, draw: Draw) -> Params:
        rounds, _ = sample_on(memory, draw, size)
        return as_memory(draw.round + 1, rounds)

    def pick(memory: Params, draw: Draw) -> list[Pick]:
        return [Pick(round) for round in pick_evenly(memory["rounds"].numpy(), draw.batch, draw_random(draw))]

    return Replay(pick, start, meet)
