"""Stratified replay: every stretch of the past is in every meta-batch."""

from online_meta.replay import ReplayPolicy, ReplayRequest, ReplaySample, request_generator
from online_meta.types import Params


def stratified() -> ReplayPolicy:
    """Return the policy that cuts the past into ``batch`` stretches of time and draws one round of each.

    One round of each of B stretches of as equal a length n_s as can be (Neyman, 1934), of weight n_s B / n: unbiased
    for the mean over all n rounds, and of less variance than uniform draws where losses drift along the stream.
    """

    def sample(memory: Params, request: ReplayRequest) -> list[ReplaySample]:
        count = len(request.rounds)
        strata = min(count, request.batch)
        random = request_generator(request)
        samples = []
        for stratum in range(strata):
            first, last = count * stratum // strata, count * (stratum + 1) // strata
            samples.append(
                ReplaySample(int(request.rounds[int(random.integers(first, last))]), (last - first) * strata / count)
            )
        return samples

    return ReplayPolicy(sample)
