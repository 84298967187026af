"""A sample of all rounds so far that takes as much room after a million rounds as after a thousand."""

import numpy as np
from numpy.typing import NDArray

from online_meta.draws import ReplayRequest, among_rounds, hash_rounds, rounds_from
from online_meta.types import Params


def update_sample(memory: Params, request: ReplayRequest, size: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return which rounds are in the sample now, and where each stood in ``memory``, -1 if it is new.

    The rounds of the ``size`` lowest hashes are a uniform sample without replacement of all rounds so far, and stay
    one whatever comes after: what Vitter's reservoir is (1985), as a function of the rounds alone.
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
